"""Weights: Hugging Face -> every rank of a layout -> Hugging Face, the same bits and names."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from scenarios.convert import ParallelLayout, convert
from scenarios.convert.shrink import shrink
from scenarios.convert.source_model import SourceModel
from scenarios.convert.tensor_files import TensorFolder
from scenarios.convert.weight_files import to_hugging_face, to_megatron
from scenarios.convert.weights import cut_part, join_parts, parameters
from tests.convert_cases import DEFAULT, published

Config = dict[str, Any]
LAYOUTS = {
    "bert": "tp2,pp2,sp",
    "gpt2": "tp2,pp2",
    "llama": "tp2,pp4,sp",
    "mistral": "pp2,vpp2",
    "mixtral": "tp2,ep4,etp1,sp,pp2",
    "qwen2": "pp2,first3",
    "qwen2_moe": "ep2,etp2",
    "qwen2_5_vl": "tp2",
    "qwen3": "tp2,pp2,vpp2",
    "qwen3_moe": "ep4,pp2",
    "qwen3_next": "tp2,sp,ep2,pp2",
    "phi3": "tp2,pp2",
    "deepseek_v2": "tp2,ep2,sp",
    "deepseek_v3": "ep8,pp2,last1",
    "glm4_moe": "tp2,sp,ep2,etp2",
    "gpt_oss": "tp2,ep4,etp2,sp",
    "gemma": "pp2,vpp2",
    "gemma2": "tp2,pp2,first1",
    "gemma3_text": "pp4",
    "gemma3": "tp2,pp2",
    "glm4": "tp2,sp,pp2,vpp2",
    "olmoe": "tp2,ep2,etp2,sp,pp2",
}


def small(model_type: str, **change: Any) -> Config:
    return shrink(published(model_type)) | change


def saved(config: Config, folder: Path) -> dict[str, torch.Tensor]:
    """The source's own files of a random model; name -> tensor."""
    torch.manual_seed(5)
    SourceModel(config).save(folder)
    return load_file(folder / "model.safetensors")


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors = TensorFolder(folder)
    return {name: tensors.read(name) for name in tensors}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


@pytest.mark.parametrize("model_type", DEFAULT)
def test_round_trip(model_type: str, tmp_path: Path) -> None:
    config = small(model_type)
    source = saved(config, tmp_path / "hf")
    layout = ParallelLayout.parse(LAYOUTS[model_type])
    to_megatron(
        tmp_path / "hf", tmp_path / "megatron", config, layout=layout, max_file_nbytes=20000
    )
    to_hugging_face(tmp_path / "megatron", tmp_path / "back", max_file_nbytes=50000)
    back = read(tmp_path / "back")
    vision = {n: t for n, t in source.items() if re.search("visual|vision|multi_modal", n)}
    assert same_bits(back | vision, source)
    assert convert(tmp_path / "back" / "config.json").gpt_model == convert(config).gpt_model
    ranks = [folder for folder in (tmp_path / "megatron").iterdir() if folder.is_dir()]
    files = list((tmp_path / "megatron" / "tp0_pp0").glob("*.safetensors"))
    assert len(files) > 1, "files are limited in size"
    held = sum(tensor.numel() for folder in ranks for tensor in read(folder).values())
    assert held >= sum(tensor.numel() for tensor in back.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tied_table_lies_on_both_ends_of_the_pipeline(dtype: torch.dtype, tmp_path: Path) -> None:
    config = small("llama", tie_word_embeddings=True)
    source = {name: tensor.to(dtype) for name, tensor in saved(config, tmp_path / "hf").items()}
    save_file(source, tmp_path / "hf" / "model.safetensors")
    layout = ParallelLayout(tp=2, pp=2)
    to_megatron(tmp_path / "hf", tmp_path / "megatron", config, layout=layout)
    first, last = read(tmp_path / "megatron/tp1_pp0"), read(tmp_path / "megatron/tp1_pp1")
    table = first["embedding.word_embeddings.weight"]
    assert torch.equal(table, last["output_layer.weight"])
    assert torch.equal(table, source["model.embed_tokens.weight"].chunk(2)[1])
    assert "decoder.layers.0.input_layernorm.weight" in last, "layers count anew in each stage"
    to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    assert same_bits(read(tmp_path / "back"), source)

    last["output_layer.weight"] = last["output_layer.weight"] + 1
    save_file(last, tmp_path / "megatron/tp1_pp1/model-00001.safetensors")
    with pytest.raises(
        ValueError, match=r"output_layer\.weight: tp1_pp1 and tp1_pp0 hold different"
    ):
        to_hugging_face(tmp_path / "megatron", tmp_path / "again")


def test_replicas_that_differ_are_refused(tmp_path: Path) -> None:
    config = small("qwen3")
    saved(config, tmp_path / "hf")
    to_megatron(tmp_path / "hf", tmp_path / "megatron", config, layout=ParallelLayout(tp=2))
    file = tmp_path / "megatron/tp1_pp0/model-00001.safetensors"
    tensors = load_file(file)
    tensors["decoder.layers.1.self_attention.q_layernorm.weight"][3] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"layers\.1.*q_layernorm.*different copies"):
        to_hugging_face(tmp_path / "megatron", tmp_path / "back")


def change_tensors(folder: Path, change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("model.norm.weight"), r"tensor 'model\.norm\.weight' is missing"),
        (lambda t: t.pop("model.embed_tokens.weight"), "embed_tokens.weight' is missing"),
        (
            lambda t: t.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}),
            r"model\.layers\.9.*belongs to no parameter",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(3, 16)}),
            "k_proj.weight.*sizes do not fit the configuration",
        ),
    ],
)
def test_files_that_do_not_fit(change: Any, expected: str, tmp_path: Path) -> None:
    config = small("llama")
    saved(config, tmp_path / "hf")
    change_tensors(tmp_path / "hf", change)
    with pytest.raises(ValueError, match=expected):
        to_megatron(tmp_path / "hf", tmp_path / "megatron", config)


def test_what_old_files_hold_besides(tmp_path: Path) -> None:
    """Rotary tables are computed anew; a tied head must equal the table; GPT-2 without prefix."""
    config = small("llama", tie_word_embeddings=True)
    saved(config, tmp_path / "hf")

    def old(t: dict[str, torch.Tensor]) -> None:
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()

    change_tensors(tmp_path / "hf", old)
    to_megatron(tmp_path / "hf", tmp_path / "megatron", config)
    change_tensors(tmp_path / "hf", lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"lm_head\.weight.*would be lost"):
        to_megatron(tmp_path / "hf", tmp_path / "other", config)

    config = small("gpt2")
    source = saved(config, tmp_path / "gpt2")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in source.items()}
    save_file(bare, tmp_path / "gpt2" / "model.safetensors")
    to_megatron(tmp_path / "gpt2", tmp_path / "gpt2_megatron", config)
    to_hugging_face(tmp_path / "gpt2_megatron", tmp_path / "gpt2_back")
    assert same_bits(read(tmp_path / "gpt2_back"), bare)


def test_old_names_and_copies_of_bert(tmp_path: Path) -> None:
    """Norms called gamma and beta, counted positions, and the output's own table and bias."""
    config = small("bert")
    source = saved(config, tmp_path / "hf")
    copies = {
        "cls.predictions.decoder.weight": source["bert.embeddings.word_embeddings.weight"].clone(),
        "cls.predictions.decoder.bias": source["cls.predictions.bias"].clone(),
    }
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(name: str) -> str:
        ending = next((new for new in old if name.endswith(new)), "")
        return name.removesuffix(ending) + old.get(ending, "")

    file = {renamed(name): tensor for name, tensor in (source | copies).items()}
    assert sum(name.endswith("gamma") for name in file) == 2 + 2 * config["num_hidden_layers"]
    positions = {"bert.embeddings.position_ids": torch.arange(512)[None]}
    save_file(file | positions, tmp_path / "hf" / "model.safetensors")
    to_megatron(tmp_path / "hf", tmp_path / "megatron", config)
    to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    assert same_bits(read(tmp_path / "back"), source | copies)
    change_tensors(tmp_path / "hf", lambda t: t["cls.predictions.decoder.bias"].add_(1))
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder\.bias.*would be lost"):
        to_megatron(tmp_path / "hf", tmp_path / "other", config)


def test_what_published_predictors_hold_besides(tmp_path: Path) -> None:
    """Copies of the embedding and of the head go through; what is no copy is refused."""
    config = small("deepseek_v3")
    source = saved(config, tmp_path / "hf")
    at = f"model.layers.{config['num_hidden_layers']}."
    copies = {
        f"{at}embed_tokens.weight": source["model.embed_tokens.weight"].clone(),
        f"{at}shared_head.head.weight": source["lm_head.weight"].clone(),
    }
    save_file(source | copies, tmp_path / "hf" / "model.safetensors")
    layout = ParallelLayout.parse("tp2,pp2,vpp2,sp,ep2")
    to_megatron(tmp_path / "hf", tmp_path / "megatron", config, layout=layout)
    last = read(tmp_path / "megatron/tp1_pp1")
    table = last["model1.embedding.word_embeddings.weight"]
    assert torch.equal(table, source["model.embed_tokens.weight"].chunk(2)[1])
    assert "model1.mtp.layers.0.eh_proj.weight" in last
    to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    assert same_bits(read(tmp_path / "back"), source | copies)

    change_tensors(tmp_path / "hf", lambda t: t[f"{at}embed_tokens.weight"].add_(1))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight.*would be lost"):
        to_megatron(tmp_path / "hf", tmp_path / "other", config)


def test_a_file_without_the_predictors_that_its_configuration_names(tmp_path: Path) -> None:
    """As transformers writes it, which leaves them out."""
    config = small("glm4_moe")
    source = saved(config, tmp_path / "hf")
    kept = {name: tensor for name, tensor in source.items() if ".layers.4." not in name}
    save_file(kept, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.4\..*without multi-token prediction has"):
        to_megatron(tmp_path / "hf", tmp_path / "megatron", config)
    without = {"mtp_num_layers": 0}
    to_megatron(tmp_path / "hf", tmp_path / "megatron", config, overrides=without)
    to_hugging_face(tmp_path / "megatron", tmp_path / "back")
    assert same_bits(read(tmp_path / "back"), kept)


def test_an_index_of_several_files(tmp_path: Path) -> None:
    config = small("qwen2")
    source = saved(config, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    weight_map = {}
    for number, name in enumerate(sorted(source)):
        file = f"part-{number % 3}.safetensors"
        weight_map[name] = file
    for file in set(weight_map.values()):
        save_file(
            {n: source[n] for n, f in weight_map.items() if f == file}, tmp_path / "hf" / file
        )
    index = tmp_path / "hf" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    to_megatron(tmp_path / "hf", tmp_path / "megatron", config)
    (tmp_path / "hf" / "part-1.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names part-1\.safetensors, which does not exist"):
        to_megatron(tmp_path / "hf", tmp_path / "other", config)


def test_folders(tmp_path: Path) -> None:
    config = small("llama")
    with pytest.raises(ValueError, match="holds no"):
        to_megatron(tmp_path, tmp_path / "megatron", config)
    with pytest.raises(ValueError, match=r"conversion\.json: cannot be read"):
        to_hugging_face(tmp_path, tmp_path / "back")
    saved(config, tmp_path / "hf")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        to_megatron(tmp_path / "hf", tmp_path / "hf", config)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    degree=st.sampled_from([1, 2, 3, 4]),
    cut=st.sampled_from(["none", "rows", "columns", "gated rows", "sections"]),
)
def test_parts_make_the_whole(rows: int, columns: int, degree: int, cut: Any) -> None:
    shape = (2 * rows * degree, columns * degree)
    whole = torch.arange(shape[0] * shape[1]).reshape(shape)
    if cut == "sections":
        cut = ((2 * rows - 1) * degree, degree)
    parts = [cut_part(whole, cut, rank, degree) for rank in range(degree)]
    assert torch.equal(join_parts(parts, cut), whole)
    sections = whole.chunk(2) if cut == "gated rows" else ()
    if isinstance(cut, tuple):
        sections = whole.split(cut)
    if sections:
        assert torch.equal(parts[-1], torch.cat([part.chunk(degree)[-1] for part in sections]))


def test_parameters_of_published_sizes() -> None:
    """Names say what they count: experts of Mixtral hold 45.1 of its 46.7 billion numbers."""
    model = convert(published("mixtral"))
    experts = [p for p in parameters(model) if p.expert is not None and "fc1" in p.name]
    assert len(experts) == 8 * 32
    names = [p.name for p in parameters(convert(published("deepseek_v3")))]
    assert len(names) == len(set(names))
    assert sum("router.expert_bias" in name for name in names) == 58 + 1, "and of multi-token"
