"""Text out of exported graphs: the loop around prefill and decode, with numpy and onnxruntime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gauge_ext.errors import ConfigError
from gauge_ext.export.adapters.session import Choice
from gauge_ext.export.adapters.table import AdapterTable
from gauge_ext.export.checks import require_packages
from gauge_ext.export.language.choose import Ids, Logits, choose, softmax
from gauge_ext.export.language.decoder import DecoderSession
from gauge_ext.export.language.graphs import DTYPES, Adapter, Feeds, FolderGraphs
from gauge_ext.export.language.prompt import padded_rows, start_token
from gauge_ext.export.language.sampling import Sampling
from gauge_ext.export.session import CPU


class OnnxGenerator:
    """Generates text with the graphs that ``export_causal_lm`` and ``export_seq2seq`` write.

    Graphs that were exported with ``mode="adapters"`` run with the adapter that each call names:
    one for the whole batch, a weighted sum of several, one for each row, or none, which is the base
    as it is.

    Args:
        folder: Their folder. End and padding tokens and the defaults of sampling come from its
            ``generation_config.json``.
        adapters: Name -> what :meth:`add` takes.
        session_options: An ``onnxruntime.SessionOptions``, for threads and the like.
        providers: Execution providers of onnxruntime.

    Attributes:
        sampling: The defaults of :meth:`generate`, but greedy.
        is_encoder_decoder: Whether there is an encoder.

    Raises:
        ConfigError: the folder has no such graph, or its settings ask for what is not done here.
        ExportError: onnxruntime is missing or cannot load a graph.
    """

    def __init__(
        self,
        folder: str | Path,
        adapters: Mapping[str, str | Path | Mapping[str, Any]] | None = None,
        *,
        session_options: Any = None,
        providers: Sequence[str] = CPU,
    ) -> None:
        require_packages("onnxruntime")
        folder = Path(folder)
        self._graphs = FolderGraphs(folder, session_options, providers)
        self._decoder, self._encoder = self._graphs.decoder, self._graphs.encoder
        self.is_encoder_decoder = self._encoder is not None
        self._folder = folder
        found = Sampling.read(folder / "generation_config.json")
        self.sampling = found.updated({"do_sample": False})
        for adapter, source in (adapters or {}).items():
            self.add(adapter, source)

    @property
    def runtime(self) -> str:
        """What runs the graphs, with its version."""
        return self._decoder.runtime

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters."""
        return self._graphs.adapters

    @property
    def tables(self) -> dict[str, AdapterTable]:
        """File name of each graph with inputs for adapters -> what they are."""
        return self._graphs.tables

    def add(self, name: str, source: str | Path | Mapping[str, Any]) -> None:
        """Loads an adapter and checks that it fits.

        Args:
            name: What ``adapter=`` calls it; one that is taken is an error.
            source: An adapter's folder in PEFT's format, a file of
                :func:`~gauge_ext.export.write_onnx_adapter`, or arrays by the graph's inputs. With
                an encoder, files and arrays are given for each graph, by the graph's file name.

        Raises:
            ConfigError: the graphs have no inputs for adapters, the name is taken, or a graph has
                no source.
            AdapterFormatError: the adapter is missing, damaged, or none.
            AdapterMismatchError: it was made for another graph.
        """
        self._graphs.add(name, source)

    def remove(self, name: str) -> None:
        """Forgets an adapter.

        Raises:
            ConfigError: there is none of that name.
        """
        self._graphs.remove(name)

    def generate(
        self,
        inputs: Any,
        *,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        max_new_tokens: int = 20,
        adapter: Adapter = None,
        seed: int | None = None,
        **options: Any,
    ) -> Ids:
        """Generates until every row has ended or has ``max_new_tokens`` new tokens.

        Greedy unless ``do_sample=True``; both are, token for token (greedy) or in distribution,
        what ``model.generate`` of transformers gives.

        Args:
            inputs: Token ids ``(batch, length)``, padded on the left (an encoder's: on any side);
                rows of different length are padded here. For a speech model its features.
            attention_mask: ``(batch, length)``, 0 where ``inputs`` is padding; by default none is,
                except what was padded here.
            decoder_input_ids: The first tokens of an encoder-decoder model's output,
                ``(batch, length)``; by default its start token.
            max_new_tokens: At least 1.
            adapter: The name of an adapter, None for the base, weights by name, or a list with one
                of these for each row; for graphs with inputs for adapters.
            seed: Of sampling.
            options: Fields of :class:`~gauge_ext.export.language.sampling.Sampling`.

        Returns:
            ``(batch, length)``: the prompt (of the decoder) and the new tokens, rows that ended
            early filled with the padding token.

        Raises:
            ConfigError: an option, a shape or a mask cannot be used.
        """
        if isinstance(max_new_tokens, bool) or max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {max_new_tokens!r}.")
        tokens, session, mask = self._begin(inputs, attention_mask, decoder_input_ids, adapter)
        sampling = self.sampling.updated(options)
        columns = [tokens, *self._steps(session, tokens, mask, sampling, max_new_tokens, seed)]
        return np.concatenate(columns, axis=1)

    def stream(
        self,
        inputs: Any,
        *,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        max_new_tokens: int = 20,
        adapter: Adapter = None,
        seed: int | None = None,
        **options: Any,
    ) -> Iterator[Ids]:
        """Like :meth:`generate`, but yields each step's new tokens ``(batch,)`` as they come."""
        tokens, session, mask = self._begin(inputs, attention_mask, decoder_input_ids, adapter)
        sampling = self.sampling.updated(options)
        for column in self._steps(session, tokens, mask, sampling, max_new_tokens, seed):
            yield column[:, 0]

    def logits(
        self,
        inputs: Any,
        *,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        adapter: Adapter = None,
    ) -> Logits:
        """The logits of every position, ``(batch, length, vocabulary)``, from one prefill."""
        tokens, session, mask = self._begin(inputs, attention_mask, decoder_input_ids, adapter)
        return session.feed(tokens, mask)

    def decoder(
        self, inputs: Any, *, attention_mask: Any = None, adapter: Adapter = None
    ) -> DecoderSession:
        """The decoder before its first token, with the encoder's result if there is one.

        Args:
            inputs: As those of :meth:`generate`; without an encoder only their number matters.
            attention_mask: As that of :meth:`generate`.
            adapter: As that of :meth:`generate`.
        """
        first = np.zeros((len(inputs), 1), np.int64) if self.is_encoder_decoder else None
        return self._begin(inputs, attention_mask, first, adapter)[1]

    def perplexity(self, tokens: Any, *, window: int = 512, adapter: Choice = None) -> float:
        """Perplexity: exp of the mean negative log-likelihood of each token after those before it.

        Long texts are cut into windows that do not overlap; the first token of each is not scored.

        Args:
            tokens: ``(length,)``, at least 2 tokens.
            window: Tokens in one run, at least 2.
            adapter: As that of :meth:`generate`, but one.

        Raises:
            ConfigError: fewer than 2 tokens, or an encoder-decoder model.
        """
        row = np.asarray(tokens, dtype=np.int64).reshape(-1)
        if self.is_encoder_decoder or row.size < 2 or window < 2:
            raise ConfigError(
                "perplexity needs a decoder-only model, at least 2 tokens and a window of at least "
                f"2, got {row.size} tokens and window={window}."
            )
        total, count = 0.0, 0
        for start in range(0, row.size - 1, window):
            piece = row[start : start + window]
            if piece.size < 2:
                break
            chances = softmax(self.logits(piece[None, :], adapter=adapter)[0, :-1])
            taken = chances[np.arange(piece.size - 1), piece[1:]]
            total -= float(np.log(np.maximum(taken, np.finfo(np.float64).tiny)).sum())
            count += piece.size - 1
        return float(np.exp(total / count))

    def _begin(
        self, inputs: Any, attention_mask: Any, decoder_input_ids: Any, adapter: Adapter
    ) -> tuple[Ids, DecoderSession, Ids | None]:
        """The first tokens of the decoder, its session, and which of those tokens are padding."""
        if adapter is not None:
            self._graphs.require_adapters()
        if self._encoder is None:
            if decoder_input_ids is not None:
                raise ConfigError("decoder_input_ids is for encoder-decoder models.")
            tokens, mask = padded_rows(inputs, attention_mask, self.sampling.pad)
            if not mask[:, -1].all():
                raise ConfigError(
                    "attention_mask has a 0 in its last column: a row is padded on the right, and "
                    "its continuation would begin after the padding.",
                    hint="Pad on the left (tokenizer.padding_side = 'left').",
                )
            session = DecoderSession(self._decoder, tokens.shape[0], adapter=adapter)
            return tokens, session, mask
        first = next(iter(self._encoder.inputs.values()))
        if first.name == "input_ids":
            source, mask = padded_rows(inputs, attention_mask, self.sampling.pad)
            feeds: Feeds = {"input_ids": source, "attention_mask": mask}
        else:
            source = np.asarray(inputs, dtype=DTYPES[first.type])
            feeds = {first.name: source}
        encoded = self._encoder.run(feeds, adapter)
        fixed: Feeds = {
            "past_key_values." + name.removeprefix("present."): array
            for name, array in encoded.items()
            if name.startswith("present.")
        }
        if "attention_mask" in feeds:
            fixed["encoder_attention_mask"] = feeds["attention_mask"]
        batch = source.shape[0]
        if decoder_input_ids is None:
            tokens = np.full((batch, 1), start_token(self._folder), np.int64)
        else:
            tokens = np.asarray(decoder_input_ids, dtype=np.int64)
        return tokens, DecoderSession(self._decoder, batch, fixed, adapter), None

    def _steps(
        self,
        session: DecoderSession,
        tokens: Ids,
        mask: Ids | None,
        sampling: Sampling,
        most: int,
        seed: int | None,
    ) -> Iterator[Ids]:
        """Yields columns of new tokens, ``(batch, 1)``."""
        random = np.random.default_rng(seed)
        ended = np.zeros(tokens.shape[0], bool)
        logits = session.feed(tokens, mask)
        for step in range(most):
            chosen = choose(logits[:, -1], tokens, sampling, random, first=step == 0)
            chosen = np.where(ended, sampling.pad, chosen)
            ended |= np.isin(chosen, sampling.eos_token_id)
            tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
            yield chosen[:, None]
            if ended.all() or step == most - 1:
                return
            logits = session.feed(chosen[:, None])
