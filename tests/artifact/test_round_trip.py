"""What is saved is loaded again: equal outputs, shared tensors, plan, report and records."""

from __future__ import annotations

import copy
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Branching, batches, stack
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxpress
from fxpress import lowering
from fxpress.errors import ArtifactError, PlanError
from fxpress.testing import BITWISE, assert_equivalent

HALF = {"prune-attention": {"pruned": 0.5, "block": 8}}

LOAD_AND_RUN = """
import sys
import torch
import fxpress
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
artifact, inputs, outputs = sys.argv[1:]
o = fxpress.load(artifact)
result = o(**load_file(inputs))
leaves = [t for t in torch.utils._pytree.tree_leaves(result) if t is not None]
save_file({str(i): t.detach().contiguous() for i, t in enumerate(leaves)}, outputs)
print(type(result).__name__)
"""


class Tagger(nn.Module):
    """A small transformer with padding masks, tied embeddings and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.mix = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight
        self.steps: Tensor
        self.scale: Tensor
        self.register_buffer("steps", torch.arange(64), persistent=False)
        self.register_buffer("scale", torch.tensor(0.5, dtype=torch.bfloat16))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """Ids (B, N), mask (B, N) True = padding -> logits (B, N, 50) and the hidden states."""
        x = self.embed(ids) + self.steps[: ids.shape[1]].float()[:, None] / 64
        states = [x]
        for layer in self.mix:
            q, k, v = layer(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            kept = None if mask is None else ~mask[:, None, None]
            o = F.scaled_dot_product_attention(q, k, v, kept)
            x = x + o.transpose(1, 2).flatten(2) * self.scale
            states.append(x)
        return {"logits": self.head(x), "states": (states, None)}


def tagged(*sizes: int) -> list[dict[str, Tensor]]:
    """One batch of each size, its last row padded."""
    found = []
    for size in sizes:
        mask = torch.zeros(size, 24, dtype=torch.bool)
        mask[-1, 16:] = True
        found.append({"ids": torch.randint(0, 50, (size, 24)), "mask": mask})
    return found


def text(o: fxpress.OptimizedModule) -> str:
    """The graphs of a module, its symbols numbered as they come."""
    names: dict[str, str] = {}
    graphs = "\n".join(str(program) for program in o.captured.programs.values())
    return re.sub(r"\bs\d+\b", lambda m: names.setdefault(m[0], f"size{len(names)}"), graphs)


def hugging_face() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A tiny model of transformers with random weights, a tied head and a ModelOutput."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        vocab_size=60,
        tie_word_embeddings=True,
        use_cache=False,
    )
    data = [{"input_ids": torch.randint(0, 60, (size, 24))} for size in (2, 3, 4)]
    return LlamaForCausalLM(config).eval(), data


def assert_loads_anywhere(o: fxpress.OptimizedModule, batch: Mapping[str, Tensor], at: Path) -> str:
    """Load in a process that knows nothing of the model; returns the type of its result."""
    artifact = o.save(at / "model.fxpress")
    save_file(dict(batch), at / "in.safetensors")
    arguments = [str(artifact), str(at / "in.safetensors"), str(at / "out.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AND_RUN, *arguments], check=True, stdout=subprocess.PIPE
    )
    outputs = load_file(at / "out.safetensors")
    leaves = [t for t in torch.utils._pytree.tree_leaves(o(**batch)) if t is not None]
    assert len(outputs) == len(leaves)
    got = [outputs[str(i)] for i in range(len(leaves))]
    assert_equivalent(lambda: got, lambda: leaves, (), exactness=BITWISE)
    return done.stdout.decode().strip()


@pytest.mark.parametrize("name", ["model.fxpress", "model.zip"])
def test_a_pruned_transformer(name: str, tmp_path: Path) -> None:
    data = tagged(2, 3, 4)
    o = fxpress.optimize(Tagger().eval(), data, judge="off", config=HALF)
    assert len(o.passes["prune-attention"].rewrites) == 2
    loaded = fxpress.load(o.save(tmp_path / name))
    for batch in [*data, *tagged(7)]:
        assert_equivalent(loaded, o, (), batch, exactness=BITWISE)
    assert text(loaded) == text(o)
    assert loaded.plan.to_json() == o.plan.to_json()
    assert loaded.report.as_dict() == o.report.as_dict()
    assert list(loaded.state_dict()) == list(o.state_dict())


def test_a_pruned_transformer_in_a_fresh_process(tmp_path: Path) -> None:
    data = tagged(2, 3, 4)
    o = fxpress.optimize(Tagger().eval(), data, judge="off", config=HALF)
    assert assert_loads_anywhere(o, tagged(5)[0], tmp_path) == "dict"


def test_a_model_of_transformers_in_a_fresh_process(tmp_path: Path) -> None:
    model, data = hugging_face()
    o = fxpress.optimize(model, data, judge="off", config=HALF)
    assert len(o.passes["prune-attention"].rewrites) == 2
    assert assert_loads_anywhere(o, data[2], tmp_path) == "CausalLMOutputWithPast"


@pytest.mark.pretrained
def test_a_pretrained_model_in_a_fresh_process(tmp_path: Path) -> None:
    from fxpress import zoo
    from fxpress.zoo import registry
    from fxpress.zoo.pretrained import DownloadError

    try:
        model = zoo.create_model("minilm", pretrained=True)
    except DownloadError as error:
        pytest.skip(str(error))
    data = registry.entry("minilm").calibration(None, 4)
    o = fxpress.optimize(model, data, judge="off", config=HALF)
    assert len(o.passes["prune-attention"].rewrites) == 6
    assert_loads_anywhere(o, data[0], tmp_path)


@pytest.mark.parametrize("form", [{"terms": 4, "block": 32}, {"rank": 64, "form": "low-rank"}])
def test_factored_layers(form: dict[str, Any], tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)).eval()
    data = [torch.randn(1, 512) for _ in range(4)]
    o = fxpress.optimize(layers, data, judge="off", config={"factor-vvma": form})
    assert len(o.passes["factor-vvma"].rewrites) == 2
    loaded = fxpress.load(o.save(tmp_path / "m"))
    assert (tmp_path / "m" / "plan.safetensors").is_file()  # factors are too large to be inline
    assert_equivalent(loaded, o, (data[0],), exactness=BITWISE)
    assert loaded.plan.to_json() == o.plan.to_json()
    assert list(loaded.passes["factor-vvma"].ledger) == ["0", "2"]


def test_tied_weights_stay_tied_and_are_saved_once(tmp_path: Path) -> None:
    o = fxpress.optimize(Tagger().eval(), tagged(2, 3), judge="off")
    loaded = fxpress.load(o.save(tmp_path / "m"))
    stored = load_file(tmp_path / "m" / "tensors.safetensors")
    assert [t.shape for t in stored.values()].count(torch.Size([50, 32])) == 1
    assert [p.shape for p in loaded.parameters()].count(torch.Size([50, 32])) == 1
    assert [p.shape for p in loaded.parameters()] == [p.shape for p in o.parameters()]


def test_parts_that_share_a_weight_share_it_again(tmp_path: Path) -> None:
    model = Branching().eval()
    view = model.first.get_parameter("1.weight")[:, :4].detach()
    model.second.weight = nn.Parameter(view)
    o = fxpress.optimize(model, batches(), judge="off")
    with pytest.warns(UserWarning, match="stays Python"):
        loaded = fxpress.load(o.save(tmp_path / "m"), model=copy.deepcopy(model))
    first, second = loaded.body.first.get_parameter("1.weight"), loaded.body.second.weight
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert torch.equal(first[:, :4], second)
    assert_equivalent(loaded, o, (batches(1)[0],), exactness=BITWISE)


def test_a_loaded_module_trains_as_the_one_that_was_saved(tmp_path: Path) -> None:
    o = fxpress.optimize(stack(2).eval(), batches(), judge="off", config=HALF)
    loaded = fxpress.load(o.save(tmp_path / "m"))
    for module in (o, loaded):
        module.train()(batches(1)[0]).square().sum().backward()
    grads = [[p.grad for p in module.parameters()] for module in (loaded, o)]
    assert_equivalent(lambda: grads[0], lambda: grads[1], (), exactness=BITWISE)


def test_what_was_trained_is_saved_as_trained(tmp_path: Path) -> None:
    o = fxpress.optimize(stack(1).eval(), batches(), judge="off", config=HALF)
    optimizer = torch.optim.SGD(o.train().parameters(), 0.1)
    o(batches(1)[0]).square().sum().backward()
    optimizer.step()
    assert_equivalent(
        fxpress.load(o.save(tmp_path / "m")), o.eval(), (batches(1)[0],), exactness=BITWISE
    )


def test_records_are_told_by_the_report(optimized: fxpress.OptimizedModule, tmp_path: Path) -> None:
    loaded = fxpress.load(optimized.save(tmp_path / "m"))
    assert list(loaded.passes) == list(optimized.passes)
    for name, record in optimized.passes.items():
        told = loaded.passes[name]
        assert told.as_dict() == record.as_dict()
        assert told.exactness == record.exactness
        assert list(told.ledger) == list(record.ledger)
        assert list(told.masks) == list(record.masks)
        for site, layout in record.masks.items():
            assert torch.equal(told.masks[site].to_dense(), layout.to_dense())
            assert torch.equal(loaded.report.masks[site], optimized.report.masks[site])


def test_refusals_keep_their_place(tmp_path: Path) -> None:
    model = nn.Sequential(stack(1), nn.Conv1d(48, 8, 1, groups=2)).eval()
    o = fxpress.optimize(model, batches(), judge="off")
    loaded = fxpress.load(o.save(tmp_path / "m"))
    told = [
        [(d.reason, d.path, d.source) for d in m.passes["normalize-linear"].declined]
        for m in (o, loaded)
    ]
    assert told[0] == told[1]
    assert [path for _, path, _ in told[0]] == ["1"]


def test_without_a_model_nothing_of_it_is_there(tmp_path: Path) -> None:
    model, x = stack(1).eval(), batches(1)[0]
    o = fxpress.optimize(model, batches(), judge="off", config=HALF)
    loaded = fxpress.load(o.save(tmp_path / "m"))
    assert loaded.original is None
    with pytest.raises(PlanError, match=r"without\(\) needs the original: fxpress.load\("):
        loaded.without("prune-attention")
    with pytest.raises(AttributeError, match=r"'config' is the original model's.*model=\.\.\."):
        _ = loaded.config
    with pytest.raises(fxpress.errors.CaptureError, match="does not fit the captured one"):
        loaded(x[:1, :5])
    again = fxpress.load(tmp_path / "m", model=model)
    assert again.original is model
    assert_equivalent(again.without("prune-attention"), model, (x,))
    with pytest.warns(UserWarning, match="runs the original"):
        again(x[:1, :5])


def test_another_model_does_not_fit(tmp_path: Path) -> None:
    o = fxpress.optimize(nn.Linear(4, 4).eval(), [torch.ones(2, 4)] * 2, judge="off")
    o.save(tmp_path / "m")
    for other, reason in (
        (nn.Linear(4, 5), r"weight is \(5, 4\) there, \(4, 4\) as saved"),
        (nn.Bilinear(4, 4, 4), r"it takes \['input1', 'input2'\], not \['input'\]"),
    ):
        with pytest.raises(ArtifactError, match=f"does not fit the model given: {reason}"):
            fxpress.load(tmp_path / "m", model=other)


def test_figures_that_are_none_are_kept(tmp_path: Path) -> None:
    o = fxpress.optimize(nn.Linear(4, 4).eval(), [torch.ones(2, 4)] * 2, judge="off")
    o.report.facts["figures"] = [math.inf, -math.inf]
    loaded = fxpress.load(o.save(tmp_path / "m"))
    assert loaded.report.as_dict()["figures"] == [math.inf, -math.inf]


def test_parts_in_python_come_from_the_model(tmp_path: Path) -> None:
    model, x = Branching().eval(), batches(1)[0]
    model.register_buffer("seen", torch.ones(2))
    o = fxpress.optimize(model, batches(), judge="off", config=HALF)
    with pytest.warns(UserWarning, match=r"the root stays Python.*model=\.\.\."):
        o.save(tmp_path / "m")
    with pytest.raises(ArtifactError, match=r"stayed Python: fxpress.load\(.*model=\.\.\."):
        fxpress.load(tmp_path / "m")
    other = copy.deepcopy(model)
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.zero_()
    loaded = fxpress.load(tmp_path / "m", model=other)
    assert_equivalent(loaded, o, (x,), exactness=BITWISE)
    assert torch.equal(loaded.seen, torch.ones(2))
    assert not any(tensor.any() for tensor in other.state_dict().values())
    with pytest.raises(ArtifactError, match="does not fit the model given: it has no module"):
        fxpress.load(tmp_path / "m", model=stack(1))
    del other.seen
    with pytest.raises(ArtifactError, match="does not fit: it has no seen"):
        fxpress.load(tmp_path / "m", model=other)


def test_a_newer_kernel_is_noted(
    optimized: fxpress.OptimizedModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generated kernel stands in on the CPU: what counts is its text."""
    monkeypatch.setattr(lowering, "_REGISTERED", dict(lowering._REGISTERED))

    def generator(source: str) -> None:
        lowering.register(
            lowering.Lowering(
                operator="fxpress::sparse_attention",
                name="stand-in",
                device_type="cpu",
                accepts=lambda site: None,
                cost=lambda site: 0.0,
                run=lambda *args: None,
                source=lambda site: source,
            )
        )

    generator("first")
    optimized.save(tmp_path / "m")
    assert not fxpress.load(tmp_path / "m").report.as_dict()["notes"]
    generator("second")
    loaded = fxpress.load(tmp_path / "m")
    assert set(loaded.sources.values()) == {"second"}
    assert "another kernel than when saved" in str(loaded.report)


def test_a_module_is_put_where_it_is_wanted(
    optimized: fxpress.OptimizedModule, tmp_path: Path
) -> None:
    """`meta` stands for a device that this machine may not have."""
    loaded = fxpress.load(optimized.save(tmp_path / "m"), device="meta")
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"meta"}
    assert loaded.captured.programs[""].placeholders[0].meta["val"].device.type == "meta"
    assert "saved on cpu, loaded on meta: masks stay compiled" in str(loaded.report)


# torch 2.11 reads its archive into bytes, and tensors on them.
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
def test_an_export_is_read_by_torch(tmp_path: Path) -> None:
    data = tagged(2, 3, 4)
    o = fxpress.optimize(Tagger().eval(), data, judge="off", config=HALF)
    exported = torch.export.load(o.export(tmp_path / "m.pt2")).module()
    for batch in [*data, *tagged(7)]:
        assert_equivalent(exported, o, (), batch, exactness=BITWISE)


def test_what_cannot_be_exported(tmp_path: Path, optimized: fxpress.OptimizedModule) -> None:
    with pytest.raises(ArtifactError, match=r"ends in \.pt2"):
        optimized.export(tmp_path / "m.onnx")
    parts = fxpress.optimize(Branching().eval(), batches(), judge="off")
    with pytest.raises(ArtifactError, match="parts with Python between them"):
        parts.export(tmp_path / "m.pt2")


def test_a_model_that_was_cast_is_refused(tmp_path: Path) -> None:
    o = fxpress.optimize(stack(1).eval(), batches(), judge="off").double()
    with pytest.raises(ArtifactError, match=r"was captured as torch\.float32"):
        o.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())
