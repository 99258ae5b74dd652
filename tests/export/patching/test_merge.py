"""Folders merged on disk, against sums taken by hand and against merging in memory."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import gauge_ext
from gauge_ext.checkpoint import LoRAPair, describe_pairs, write_adapter
from gauge_ext.errors import AdapterMismatchError, ConfigError, NonFiniteError, WriteError
from gauge_ext.export import merge_checkpoint
from gauge_ext.export.adapters.file import effective_factors
from gauge_ext.export.patching import merge as merge_module
from gauge_ext.export.patching import update
from gauge_ext.export.patching.adapter_arrays import open_adapter
from gauge_ext.export.patching.merge import PROVENANCE_NAME

transformers = pytest.importorskip("transformers")


@pytest.fixture
def base(llama, tmp_path) -> Path:
    """The tiny Llama in three shards, with files that belong to it and files that do not."""
    folder = tmp_path / "base"
    llama.save_pretrained(folder, max_shard_size="6KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (folder / "tokenizer.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "notes.txt").write_text("kept")
    (folder / "pytorch_model.bin").write_bytes(b"unmerged")
    (folder / "sub" / "model.gguf").write_bytes(b"unmerged")
    (folder / "adapter_config.json").write_text("{}")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "junk").write_text("")
    return folder


@pytest.fixture
def adapter(llama, make_peft_adapter) -> Path:
    return make_peft_adapter(llama, r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found.update(safetensors.torch.load_file(file))
    return found


def rewrite(folder: Path, change: Any) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = {name: change(name, t) for name, t in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def test_every_shard_against_the_sum_by_hand(base, adapter, llama, merge_by_hand, tmp_path):
    out = tmp_path / "out"
    told: list[float] = []
    report = merge_checkpoint(base, adapter, out, progress=lambda what, share: told.append(share))
    before, after = tensors_of(base), tensors_of(out)
    expected = merge_by_hand(llama, adapter, 2.0).state_dict()
    assert list(before) == list(after)
    assert len(report.merged) == 4
    assert report.carried == len(before) - 4
    for name, tensor in after.items():
        if name in report.merged:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
            assert not torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name])
    for file in base.glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert file.read_bytes()[:length] == (out / file.name).read_bytes()[:length]
    assert told == sorted(told)
    assert told[-1] == 1.0
    model = transformers.LlamaForCausalLM.from_pretrained(out)
    assert all(torch.equal(model.state_dict()[name], after[name]) for name in report.merged)


def test_what_is_carried_and_what_is_not(base, adapter, tmp_path):
    out = tmp_path / "out"
    report = merge_checkpoint(base, adapter, out)
    for name in ("config.json", "tokenizer.json", "sub/notes.txt", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    assert sorted(map(str, report.skipped)) == [
        "adapter_config.json",
        "pytorch_model.bin",
        "sub/model.gguf",
    ]
    written = sorted(p for p in out.rglob("*") if p.is_file())
    assert sorted(report.files) == written
    assert report.bytes_written == sum(p.stat().st_size for p in written)
    assert not (out / ".cache").exists()
    said = json.loads((out / PROVENANCE_NAME).read_text())
    assert said["adapter_sha256"] == report.adapter_sha256
    assert said["merged"]["model.layers.1.mlp.down_proj.weight"] == {"rank": 3, "scaling": 2.0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_are_rounded_once(dtype, base, adapter, llama, tmp_path, monkeypatch):
    rewrite(base, lambda name, tensor: tensor.to(dtype))
    monkeypatch.setattr(update, "CHUNK", 5 * 4 * 16)  # blocks of a few rows, the last smaller
    merge_checkpoint(base, adapter, tmp_path / "out")
    model = llama.to(dtype)
    gauge_ext.load_adapter(model, adapter)
    gauge_ext.merge(model)
    after = tensors_of(tmp_path / "out")
    exact = 0
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        expected = model.state_dict()[name]
        # The order of r products may differ between a block and the whole: half a unit at most.
        torch.testing.assert_close(tensor, expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
        exact += int((tensor == expected).sum())
    assert exact > 0.99 * sum(tensor.numel() for tensor in after.values())


def test_a_prefix_that_the_folder_lacks_or_has(base, adapter, tmp_path):
    expected = tensors_of_merge(base, adapter, tmp_path / "as_it_is")
    for number, rename in enumerate((lambda n: n.removeprefix("model."), lambda n: f"lm.{n}")):
        single = tmp_path / f"single{number}"
        single.mkdir()
        renamed = {rename(name): tensor for name, tensor in tensors_of(base).items()}
        safetensors.torch.save_file(renamed, single / "model.safetensors")
        found = tensors_of_merge(single, adapter, tmp_path / f"out{number}")
        assert {rename(name) for name in expected} == set(found)
        assert all(torch.equal(found[rename(name)], tensor) for name, tensor in expected.items())


def tensors_of_merge(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    merge_checkpoint(base, adapter, out)
    return tensors_of(out)


def test_sentence_transformers_parts_come_along(base, adapter, tmp_path):
    (base / "modules.json").write_text('[{"path": ""}, {"path": "2_Dense"}]')
    for name in ("2_Dense", "3_Other"):
        (base / name).mkdir()
        (base / name / "model.safetensors").write_bytes(b"x")
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").exists()
    assert Path("3_Other/model.safetensors") in report.skipped


def test_an_adapter_for_another_model(base, bert, make_peft_adapter, tmp_path):
    adapter = make_peft_adapter(bert, name="bert", r=2, target_modules=["query"])
    with pytest.raises(AdapterMismatchError, match=r"2 of the adapter's 2 modules.*query.*named"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_shape(base, adapter, tmp_path):
    rewrite(base, lambda name, t: t[:, :-1].contiguous() if name.endswith("q_proj.weight") else t)
    with pytest.raises(AdapterMismatchError, match=r"q_proj'.*shape \(16, 16\).*\(16, 15\)"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_a_tied_head(base, llama, adapted, tmp_path):
    adapter = tmp_path / "head"
    gauge_ext.save_adapter(adapted(llama, target_modules=["lm_head", "q_proj"]), adapter)
    with pytest.raises(AdapterMismatchError, match=r"'lm_head'.*ties its output.*tie_word"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    single = tmp_path / "stored_twice"
    single.mkdir()
    shutil.copy(base / "config.json", single)
    tensors = tensors_of(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, single / "model.safetensors")
    with pytest.raises(
        AdapterMismatchError, match=r"'lm_head'.*without the merged weight.*tie_word"
    ):
        merge_checkpoint(single, adapter, tmp_path / "out")


@pytest.mark.parametrize("twice", [False, True], ids=["stored once", "stored twice"])
def test_an_adapter_that_ties_a_head_is_merged_once(twice, base, llama, adapted, tmp_path):
    fields = {"rank": 3, "alpha": 6.0, "ensure_weight_tying": True}
    model = gauge_ext.attach(
        llama, gauge_ext.LoRAConfig(target_modules=["embed_tokens", "q_proj"], **fields)
    )
    for parameter in gauge_ext.adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.2)
    adapter, before = gauge_ext.save_adapter(model, tmp_path / "tied"), tensors_of(base)
    if twice:
        shutil.rmtree(base)
        base.mkdir()
        llama.config.save_pretrained(base)
        copied = {**before, "lm_head.weight": before["model.embed_tokens.weight"].clone()}
        safetensors.torch.save_file(copied, base / "model.safetensors")
    own = model.model.embed_tokens
    expected = before["model.embed_tokens.weight"].double()
    expected += 2.0 * (own.lora_B.double() @ own.lora_A.double()).T.detach()
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    merged = {name for name in report.merged if "q_proj" not in name}
    named = {"model.embed_tokens.weight"} | ({"lm_head.weight"} if twice else set())
    assert merged == named
    found = tensors_of(tmp_path / "out")
    for name in named:
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-6)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    # Beside one that changes the embedding alone, they would come apart.
    other = attached_to_the_table(adapted, llama, tmp_path / "other")
    with pytest.raises(AdapterMismatchError, match="ties (its output|to its (out|in)put)"):
        merge_checkpoint(base, [(adapter, 1.0), (other, 1.0)], tmp_path / "both")


def attached_to_the_table(adapted: Any, llama: torch.nn.Module, folder: Path) -> Path:
    gauge_ext.detach(llama)
    return gauge_ext.save_adapter(adapted(llama, target_modules=["embed_tokens"]), folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(bad, base, adapter, tmp_path, listing):
    before = listing()

    def spoil(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name == "model.layers.1.mlp.down_proj.weight":
            tensor[3, 4] = bad
        return tensor

    rewrite(base, spoil)
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert listing() == before


def test_an_update_beyond_float16(base, adapter, tmp_path):
    rewrite(base, lambda name, t: torch.full_like(t, 65504.0).half())
    rewrite(adapter, lambda name, t: torch.full_like(t, 100.0))
    with pytest.raises(NonFiniteError, match=r"plus its update exceeds the range of float16"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_damaged_and_missing_bases(base, adapter, tmp_path):
    out = tmp_path / "out"
    shard = sorted(base.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    for damaged in (content[:-5], content[:20], b"", b"\xff" * 40, content + b"x"):
        shard.write_bytes(damaged)
        with pytest.raises(ConfigError, match=f"{shard.name} is not a whole safetensors file"):
            merge_checkpoint(base, adapter, out)
    shard.unlink()
    with pytest.raises(ConfigError, match=f"names the shard '{shard.name}', which is not in"):
        merge_checkpoint(base, adapter, out)
    (base / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ConfigError, match="has no weight_map"):
        merge_checkpoint(base, adapter, out)
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match=r"only pytorch_model\.bin.*save_pretrained"):
        merge_checkpoint(base, adapter, out)
    with pytest.raises(ConfigError, match="there is no folder"):
        merge_checkpoint(tmp_path / "nowhere", adapter, out)
    assert not out.exists()


def test_an_index_that_points_outside(base, adapter, tmp_path):
    index = base / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"w": "../base/model.safetensors"}}')
    with pytest.raises(ConfigError, match="which is not in"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_quantized_bases(base, adapter, tmp_path):
    rewrite(base, lambda name, t: t.to(torch.int8) if name.endswith("q_proj.weight") else t)
    with pytest.raises(ConfigError, match=r"is stored as I8.*unquantized base"):
        merge_checkpoint(base, adapter, tmp_path / "out")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"is quantized \(gptq\)"):
        merge_checkpoint(base, adapter, tmp_path / "out")


def test_targets_that_cannot_be_written(base, adapter, tmp_path):
    with pytest.raises(WriteError, match="not an empty folder"):
        merge_checkpoint(base, adapter, base)
    with pytest.raises(WriteError):
        merge_checkpoint(base, adapter, base / "config.json" / "out")


def test_a_disk_that_fills_up(base, adapter, tmp_path, listing, monkeypatch):
    before = listing()
    copy = shutil.copyfile
    left = [3]

    def copyfile(source: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(WriteError, match="No space left on device"):
        merge_checkpoint(base, adapter, tmp_path / "deep" / "out")
    assert listing() == before


def test_several_adapters_with_weights(base, adapter, llama, merge_by_hand, tmp_path):
    merge_checkpoint(base, [(adapter, 0.5), (adapter, -1.5)], tmp_path / "out")
    expected = merge_by_hand(llama, adapter, -2.0).state_dict()
    for name, tensor in tensors_of(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_merge_goes_on_where_it_was(
    error, base, adapter, tmp_path, listing, monkeypatch
):
    whole = tensors_of_merge(base, adapter, tmp_path / "whole")
    before = listing()
    shards = sorted(base.glob("*.safetensors"))
    original = merge_module._merge_shard
    done: list[str] = []

    def stop_at_the_third(source: Path, *rest: Any) -> None:
        if len(done) == 2:
            raise error
        original(source, *rest)
        done.append(source.name)

    monkeypatch.setattr(merge_module, "_merge_shard", stop_at_the_third)
    with pytest.raises(error):
        merge_checkpoint(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(merge_module, "_merge_shard", original)
    report = merge_checkpoint(base, adapter, tmp_path / "out")
    assert sorted(map(str, report.resumed)) == sorted(done)
    assert len(done) == 2 < len(shards)
    after = tensors_of(tmp_path / "out")
    assert all(torch.equal(after[name], tensor) for name, tensor in whole.items())
    assert [name for name in listing() if not name.startswith("out")] == before


def test_what_another_merge_left_is_not_used(base, adapter, tmp_path, monkeypatch):
    original = merge_module._merge_shard

    def stop(source: Path, *rest: Any) -> None:
        original(source, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_module, "_merge_shard", stop)
    for _ in range(2):  # the second goes on after the first, whose shard was not finished
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoint(base, adapter, tmp_path / "out")
    monkeypatch.setattr(merge_module, "_merge_shard", original)
    report = merge_checkpoint(base, {adapter: 0.25}, tmp_path / "out")
    assert report.resumed == ()
    single = tensors_of_merge_weighted(base, adapter, 0.25, tmp_path / "fresh")
    assert all(torch.equal(t, single[n]) for n, t in tensors_of(tmp_path / "out").items())


def tensors_of_merge_weighted(
    base: Path, adapter: Path, weight: float, out: Path
) -> dict[str, torch.Tensor]:
    merge_checkpoint(base, {adapter: weight}, out)
    return tensors_of(out)


def test_two_at_once(base, adapter, tmp_path, monkeypatch):
    original = merge_module._merge_shard

    def again(*arguments: Any) -> None:
        monkeypatch.setattr(merge_module, "_merge_shard", original)
        with pytest.raises(WriteError, match="another process is writing it"):
            merge_checkpoint(base, adapter, tmp_path / "out")
        original(*arguments)

    monkeypatch.setattr(merge_module, "_merge_shard", again)
    merge_checkpoint(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("family", ["gpt2", None])
def test_weights_that_lie_transposed(family, base, adapter, llama, merge_by_hand, tmp_path):
    """Conv1D's layout: down_proj shows it by its shape, q_proj is square."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": True}))
    rewrite(base, lambda name, t: t.T.contiguous() if "_proj" in name else t)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": family}))
    expected = merge_by_hand(llama, adapter, 2.0).state_dict()
    for name, tensor in tensors_of_merge(base, adapter, tmp_path / "out").items():
        wanted = expected[name].T if "_proj" in name else expected[name]
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)


def test_square_weights_that_may_lie_either_way(base, llama, make_peft_adapter, tmp_path):
    adapter = make_peft_adapter(llama, name="q", r=2, target_modules=["q_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "fan_in_fan_out": True}))
    with pytest.raises(ConfigError, match="every weight of it in .* is square"):
        merge_checkpoint(base, adapter, tmp_path / "out")


_MEASURED = """
import sys
import numpy
# Not ru_maxrss, which is inherited.
peak = lambda: next(
    int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")
)
before = peak()
from gauge_ext.export.patching.merge import merge_checkpoint
merge_checkpoint(*sys.argv[1:4])
assert not {"torch", "onnx", "safetensors"} & set(sys.modules)
print(peak() - before)
"""


def test_memory_stays_small(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {f"layers.{i}.q.weight": torch.zeros(4096, 3072).bfloat16() for i in range(6)}
    tensors["embed.weight"] = torch.zeros(20_000, 3072)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    pairs = {f"layers.{i}.q": LoRAPair(torch.ones(8, 3072), torch.ones(4096, 8)) for i in range(6)}
    write_adapter(describe_pairs(pairs), pairs, tmp_path / "adapter")
    del tensors
    command = [sys.executable, "-c", _MEASURED, folder, tmp_path / "adapter", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "model.safetensors").stat().st_size > 300 * 2**20
    assert 0 < float(done.stdout) < 64
    assert tensors_of(tmp_path / "out")["layers.5.q.weight"].eq(8.0).all()


def test_bare_parameters_take_the_model(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    config = gauge_ext.LoRAConfig(target_modules=[], target_parameters=["0.weight"])
    gauge_ext.save_adapter(gauge_ext.attach(model, config), tmp_path)
    with pytest.raises(ConfigError, match=r"target_parameters = \['0.weight'\].*only the model"):
        open_adapter(tmp_path)
    with pytest.raises(AdapterMismatchError, match="no matrices of a linear layer"):
        effective_factors(model)
