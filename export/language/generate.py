"""Text out of exported graphs: the loop around prefill and decode, with numpy and onnxruntime."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gauge_ext.errors import ConfigError, ExportError
from gauge_ext.export.checks import require_packages
from gauge_ext.export.language.choose import Ids, Logits, choose, softmax
from gauge_ext.export.language.sampling import Sampling

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
Feeds = dict[str, NDArray[Any]]


class DecoderSession:
    """One decoder graph with its cache: feed tokens, get logits, and the past is kept.

    Args:
        session: An ``onnxruntime.InferenceSession`` of a graph with ``past_key_values.*`` inputs
            and ``present.*`` outputs.
        batch: How many rows.
        fixed: Inputs that stay the same at every step, such as the encoder's keys and values.

    Attributes:
        length: How many tokens each row's past holds, padding included.
    """

    def __init__(
        self, session: Any, batch: int, fixed: Mapping[str, NDArray[Any]] | None = None
    ) -> None:
        self._session = session
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._fixed = {name: array for name, array in (fixed or {}).items() if name in self._inputs}
        self._outputs = [value.name for value in session.get_outputs()]
        self._past: Feeds = {}
        for name, value in self._inputs.items():
            if name.startswith("past_key_values.") and name not in self._fixed:
                _, heads, _, size = value.shape
                self._past[name] = np.zeros((batch, heads, 0, size), _DTYPES[value.type])
        self._mask = np.zeros((batch, 0), np.int64)

    @property
    def length(self) -> int:
        """How many tokens each row's past holds, padding included."""
        return self._mask.shape[1]

    def feed(self, tokens: Ids, mask: Ids | None = None) -> Logits:
        """Runs the graph on more tokens.

        Args:
            tokens: ``(batch, new)``.
            mask: ``(batch, new)``, 0 where a token is padding; by default none is.

        Returns:
            Logits ``(batch, new, vocabulary)``.
        """
        new = np.ones_like(tokens) if mask is None else mask
        self._mask = np.concatenate([self._mask, new], axis=1)
        ids = "decoder_input_ids" if "decoder_input_ids" in self._inputs else "input_ids"
        feeds: Feeds = {ids: tokens, **self._past, **self._fixed}
        if "attention_mask" in self._inputs:
            feeds["attention_mask"] = self._mask
        if "position_ids" in self._inputs:
            # Padding on the left does not count; its own position is of no consequence.
            positions = np.maximum(self._mask.cumsum(axis=1) - 1, 0)
            feeds["position_ids"] = positions[:, -tokens.shape[1] :]
        results = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        for name in self._past:
            self._past[name] = results["present." + name.removeprefix("past_key_values.")]
        logits: Logits = results["logits"]
        return logits


class OnnxGenerator:
    """Generates text with the graphs that ``export_causal_lm`` and ``export_seq2seq`` write.

    Args:
        folder: Their folder. End and padding tokens and the defaults of sampling come from its
            ``generation_config.json``.
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
        *,
        session_options: Any = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
    ) -> None:
        require_packages("onnxruntime")
        folder = Path(folder)
        self.is_encoder_decoder = (folder / "encoder_model.onnx").is_file()
        name = "decoder_model.onnx" if self.is_encoder_decoder else "model.onnx"
        self._decoder = _open(folder / name, session_options, providers)
        self._encoder = (
            _open(folder / "encoder_model.onnx", session_options, providers)
            if self.is_encoder_decoder
            else None
        )
        self._folder = folder
        found = Sampling.read(folder / "generation_config.json")
        self.sampling = found.updated({"do_sample": False})

    def generate(
        self,
        inputs: Any,
        *,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        max_new_tokens: int = 20,
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
        tokens, session, mask = self._begin(inputs, attention_mask, decoder_input_ids)
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
        seed: int | None = None,
        **options: Any,
    ) -> Iterator[Ids]:
        """Like :meth:`generate`, but yields each step's new tokens ``(batch,)`` as they come."""
        tokens, session, mask = self._begin(inputs, attention_mask, decoder_input_ids)
        sampling = self.sampling.updated(options)
        for column in self._steps(session, tokens, mask, sampling, max_new_tokens, seed):
            yield column[:, 0]

    def logits(
        self, inputs: Any, *, attention_mask: Any = None, decoder_input_ids: Any = None
    ) -> Logits:
        """The logits of every position, ``(batch, length, vocabulary)``, from one prefill."""
        tokens, session, mask = self._begin(inputs, attention_mask, decoder_input_ids)
        return session.feed(tokens, mask)

    def decoder(self, inputs: Any, *, attention_mask: Any = None) -> DecoderSession:
        """The decoder before its first token, with the encoder's result if there is one.

        Args:
            inputs: As those of :meth:`generate`; without an encoder only their number matters.
            attention_mask: As that of :meth:`generate`.
        """
        first = np.zeros((len(inputs), 1), np.int64) if self.is_encoder_decoder else None
        return self._begin(inputs, attention_mask, first)[1]

    def perplexity(self, tokens: Any, *, window: int = 512) -> float:
        """Perplexity: exp of the mean negative log-likelihood of each token after those before it.

        Long texts are cut into windows that do not overlap; the first token of each is not scored.

        Args:
            tokens: ``(length,)``, at least 2 tokens.
            window: Tokens in one run, at least 2.

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
            chances = softmax(self.logits(piece[None, :])[0, :-1])
            taken = chances[np.arange(piece.size - 1), piece[1:]]
            total -= float(np.log(np.maximum(taken, np.finfo(np.float64).tiny)).sum())
            count += piece.size - 1
        return float(np.exp(total / count))

    def _begin(
        self, inputs: Any, attention_mask: Any, decoder_input_ids: Any
    ) -> tuple[Ids, DecoderSession, Ids | None]:
        """The first tokens of the decoder, its session, and which of those tokens are padding."""
        if self._encoder is None:
            if decoder_input_ids is not None:
                raise ConfigError("decoder_input_ids is for encoder-decoder models.")
            tokens, mask = _rows(inputs, attention_mask, self.sampling.pad)
            if not mask[:, -1].all():
                raise ConfigError(
                    "attention_mask has a 0 in its last column: a row is padded on the right, and "
                    "its continuation would begin after the padding.",
                    hint="Pad on the left (tokenizer.padding_side = 'left').",
                )
            return tokens, DecoderSession(self._decoder, tokens.shape[0]), mask
        first = self._encoder.get_inputs()[0]
        if first.name == "input_ids":
            source, mask = _rows(inputs, attention_mask, self.sampling.pad)
            feeds: Feeds = {"input_ids": source, "attention_mask": mask}
        else:
            source = np.asarray(inputs, dtype=_DTYPES[first.type])
            feeds = {first.name: source}
        names = [value.name for value in self._encoder.get_outputs()]
        encoded = dict(zip(names, self._encoder.run(names, feeds), strict=True))
        fixed: Feeds = {
            "past_key_values." + name.removeprefix("present."): array
            for name, array in encoded.items()
            if name.startswith("present.")
        }
        if "attention_mask" in feeds:
            fixed["encoder_attention_mask"] = feeds["attention_mask"]
        batch = source.shape[0]
        if decoder_input_ids is None:
            tokens = np.full((batch, 1), _start_token(self._folder), np.int64)
        else:
            tokens = np.asarray(decoder_input_ids, dtype=np.int64)
        return tokens, DecoderSession(self._decoder, batch, fixed), None

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


def _open(path: Path, options: Any, providers: Sequence[str]) -> Any:
    import onnxruntime

    if not path.is_file():
        raise ConfigError(
            f"there is no {path.name} in {path.parent}.",
            hint="Give a folder that export_causal_lm or export_seq2seq wrote.",
        )
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    # onnxruntime's exceptions have no common base but Exception; they are raised on.
    except Exception as error:
        raise ExportError(f"onnxruntime cannot load {path}: {error}") from error
    if not any(value.name.startswith("past_key_values.") for value in session.get_inputs()) and (
        path.name != "encoder_model.onnx"
    ):
        raise ConfigError(
            f"{path} has no past_key_values inputs, so it cannot generate step by step.",
            hint="Export it with export_causal_lm (--task text-generation).",
        )
    return session


def _start_token(folder: Path) -> int:
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8")).get("decoder_start_token_id")
            if isinstance(found, int):
                return found
    raise ConfigError(
        f"{folder} names no decoder_start_token_id.", hint="Write it into generation_config.json."
    )


def _rows(inputs: Any, attention_mask: Any, pad: int) -> tuple[Ids, Ids]:
    """Token ids and mask as arrays; rows of different length are padded on the left."""
    try:
        rows = [np.asarray(row, dtype=np.int64) for row in inputs]
        longest = max(row.size for row in rows)
        fine = longest > 0 and all(row.ndim == 1 for row in rows)
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ConfigError(
            "token ids must be rows of integers, (batch, length), with at least one token.",
            hint="A single text is a batch of one: [ids].",
        )
    tokens = np.full((len(rows), longest), pad, np.int64)
    mask = np.zeros_like(tokens)
    for index, row in enumerate(rows):
        tokens[index, longest - row.size :] = row
        mask[index, longest - row.size :] = 1
    if attention_mask is not None:
        given = np.asarray(attention_mask, dtype=np.int64)
        if given.shape != tokens.shape:
            raise ConfigError(
                f"attention_mask has shape {given.shape}, the token ids {tokens.shape}."
            )
        mask = given
    return tokens, mask
