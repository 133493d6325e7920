"""Adapters on models, against PEFT itself: it makes each variant and merges it, in f64.

An adapter is right if the model with it is what PEFT makes of both, rounded once. In f32 the sum
over the rank may be off by a rounding a step; in bf16 by one rounding more.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
tokenizers = pytest.importorskip("tokenizers")

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Tensors = dict[str, Any]

# What PEFT and transformers say of each other's next releases.
pytestmark = pytest.mark.filterwarnings("ignore")

#: Half the distance of two numbers from 1 on.
F32, BF16 = 2.0**-24, 2.0**-8


def llama(**changes: Any) -> Any:
    config = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
        **changes,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def qwen2() -> Any:
    """Attention has biases."""
    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def mixtral() -> Any:
    """Experts are one parameter in transformers 5, and a tensor each in files."""
    config = transformers.MixtralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def gpt_oss(intermediate_size: int = 24) -> Any:
    """Experts are one parameter in files, too, which is stored transposed."""
    config = transformers.GptOssConfig(
        vocab_size=40, hidden_size=16, intermediate_size=intermediate_size, num_hidden_layers=1,
        head_dim=4, num_attention_heads=4, num_key_value_heads=2, num_local_experts=3,
        num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


def square_gpt_oss() -> Any:
    """Shapes do not say that experts are stored transposed: the real model has such ones."""
    return gpt_oss(intermediate_size=16)


def granite() -> Any:
    """Experts have other names in files than in modules."""
    config = transformers.GraniteMoeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.GraniteMoeForCausalLM(config)


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def bert() -> Any:
    """The bias of the head has two names."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=24,
        decoder_ffn_dim=24, encoder_attention_heads=4, decoder_attention_heads=4, num_mel_bins=8,
        max_source_positions=16, max_target_positions=16, pad_token_id=1, bos_token_id=1,
        eos_token_id=1, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def captions() -> Any:
    """A decoder that stores square weights transposed, behind an encoder that does not."""
    encoder = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=8, patch_size=4,
    )  # fmt: skip
    decoder = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8,
        add_cross_attention=True, is_decoder=True,
    )  # fmt: skip
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    return transformers.VisionEncoderDecoderModel(config=config)


def convolutions() -> Any:
    """Kernels of one and several dimensions."""
    config = transformers.Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(5, 3),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


def vision() -> Any:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def targets(*modules: str, r: int = 4, **config: Any) -> dict[str, Any]:
    """Return the config of an adapter for modules."""
    return {"r": r, "target_modules": list(modules), **config}


#: What PEFT can make: the model, and the adapter's config.
VARIANTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "linear": (llama, targets(*LINEAR, lora_alpha=10)),
    "all linear": (llama, {"r": 3, "target_modules": "all-linear"}),
    "rank 1": (llama, targets("q_proj", r=1, lora_alpha=0.5)),
    "rank 40": (llama, targets("down_proj", r=40, lora_alpha=20)),
    "gaussian": (llama, targets("q_proj", init_lora_weights="gaussian")),
    "rslora": (llama, targets(*LINEAR, r=8, use_rslora=True)),
    "patterns": (
        llama,
        targets(
            "q_proj",
            "k_proj",
            "down_proj",
            rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 6, "model.*.k_proj": 3},
            alpha_pattern={r"layers\.0\..*": 5, "down_proj": 1, "q_proj": 100},
        ),
    ),
    "dora": (llama, targets(*LINEAR, use_dora=True)),
    "dora rslora": (llama, targets("up_proj", use_dora=True, use_rslora=True)),
    "dora embeddings": (llama, targets("embed_tokens", "v_proj", use_dora=True)),
    "embeddings": (llama, targets("embed_tokens", "lm_head", "q_proj")),
    "saved": (llama, targets("q_proj", modules_to_save=["embed_tokens", "norm"])),
    "rows": (llama, targets("q_proj", trainable_token_indices=[7, 3, 39])),
    "rows by name": (llama, targets("q_proj", trainable_token_indices={"embed_tokens": [1, 0]})),
    "bias all": (qwen2, targets("q_proj", "o_proj", bias="all")),
    "bias lora_only": (qwen2, targets("q_proj", bias="lora_only")),
    "lora_bias": (qwen2, targets("q_proj", "k_proj", lora_bias=True)),
    "conv1d": (gpt2, targets(*CONV1D, fan_in_fan_out=True)),
    "conv1d with the flag off": (gpt2, targets(*CONV1D, fan_in_fan_out=False)),
    "conv1d dora": (gpt2, targets("c_attn", "c_fc", fan_in_fan_out=True, use_dora=True)),
    "convolution": (convolutions, targets("conv_layers.1.conv", "q_proj")),
    "convolution 2d": (vision, targets("projection")),
    "convolution 2d dora": (vision, targets("projection", use_dora=True)),
    "modules of other names": (vision, targets("q_proj", "o_proj", "fc1", bias="all")),
    "experts": (mixtral, targets("q_proj", target_parameters=EXPERTS)),
    "experts of other ranks": (
        mixtral,
        targets(
            target_parameters=EXPERTS,
            rank_pattern={"mlp.experts.down_proj": 2},
            alpha_pattern={".*gate_up_proj": 5},
        ),
    ),
    "experts of one parameter": (mixtral, targets(target_parameters=EXPERTS[1:])),
    "experts transposed": (gpt_oss, targets(target_parameters=EXPERTS)),
    "square experts transposed": (square_gpt_oss, targets(target_parameters=EXPERTS)),
    "experts of other names": (
        granite,
        targets("q_proj", target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "a saved embedding without its head": (
        tied,
        targets("q_proj", modules_to_save=["embed_tokens"]),
    ),
    "a saved embedding with its head": (
        tied,
        targets("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "both saved": (tied, targets("q_proj", modules_to_save=["embed_tokens", "lm_head"])),
    "a bias by two names": (bert, targets("query", bias="all")),
    "a head of whisper's": (whisper, targets("conv1", "q_proj", modules_to_save=["proj_out"])),
    "an encoder and another decoder": (captions, targets("c_proj", "c_attn", "query", "q_attn")),
    "velora": (llama, targets("q_proj", velora_config=peft.tuners.lora.config.VeloraConfig())),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def base(place: Path, make: Callable[[], Any]) -> Path:
    """Return the folder of a model in bf16, whose weights are all drawn."""
    folder = place / make.__name__
    if not folder.exists():
        torch.manual_seed(1)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3)
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def load(folder: Path, make: Callable[[], Any], dtype: Any) -> Any:
    return type(make()).from_pretrained(folder, dtype=dtype)


def train(place: Path, make: Callable[[], Any], name: str, **config: Any) -> Path:
    """Return the folder of an adapter that was trained: no number is what it was at the start."""
    folder = place / name.replace(" ", "-").replace(",", "")
    model = load(base(place, make), make, torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    torch.manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                std = 1.0 if "magnitude" in key else 0.2
                parameter.add_(torch.randn_like(parameter) * std)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(place: Path, make: Callable[[], Any], adapter: Path, dtype: Any) -> Path:
    """Return the folder of the model that PEFT makes of both, in some precision."""
    folder = place / f"{adapter.name}-{str(dtype)[6:]}"
    model = load(place / make.__name__, make, dtype)
    model = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    model.to(dtype).merge_and_unload().save_pretrained(folder)
    return folder


def read(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= safetensors_torch.load_file(file)
    return found


def fuse(reference: str, dtype: str | None = None) -> Any:
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": reference}]}
    if dtype is not None:
        recipe["dtype"] = dtype
    return oxmerge.lazy(recipe, framework="pt")


def bound(config: dict[str, Any], *tensors: Any) -> float:
    """Return how far f32 may be off: a rounding for each step of the rank and a few for the rest.

    Factors are drawn so that no product is larger than a few times the largest number there is.
    """
    rank: int = max(config["r"], 8)
    largest = max(float(each.abs().max()) for each in tensors)
    return 4 * (rank + 8) * F32 * max(1.0, largest)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_what_peft_makes_of_it(name: str, place: Path) -> None:
    make, config = VARIANTS[name]
    model = base(place, make)
    adapter = train(place, make, name, **config)
    exact, before = read(merged_by_peft(place, make, adapter, torch.float64)), read(model)
    single, half = (fuse(f"{model}+{adapter}", dtype) for dtype in ("float32", None))
    assert set(single) == set(half) == set(exact)
    changed = 0
    for key, expected in exact.items():
        was = before.get(key, torch.zeros(())).double()  # a head of its own is new
        off = bound(config, expected, was)
        assert (single[key].double() - expected).abs().max() <= off, key
        assert half[key].dtype == torch.bfloat16
        # One rounding more.
        assert ((half[key].double() - expected).abs() <= expected.abs() * BF16 + off).all(), key
        changed += not torch.equal(expected, was)
    assert changed > 0


@pytest.mark.parametrize(
    ("name", "modules", "config"),
    [
        ("tied as one", ("embed_tokens",), {"ensure_weight_tying": True}),
        ("tied as one, dora", ("embed_tokens",), {"ensure_weight_tying": True, "use_dora": True}),
        ("a tied head alone", ("lm_head",), {}),
        ("a tied table alone", ("embed_tokens",), {}),
    ],
)
def test_a_table_and_its_head_are_as_they_were_trained(
    place: Path, name: str, modules: tuple[str, ...], config: dict[str, Any]
) -> None:
    """PEFT's own merge adds to the one tensor that both share: its model tells before that."""
    model = base(place, tied)
    adapter = train(place, tied, name, **targets("q_proj", *modules, **config))
    trained = peft.PeftModel.from_pretrained(load(model, tied, torch.float32), adapter).eval()
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{model}+{adapter}"}]}
    oxmerge.merge(recipe | {"dtype": "float32"}, out := place / f"{adapter.name}-fused")
    ids = torch.arange(8)[None]
    ours = load(out, tied, torch.float32).eval()
    assert torch.allclose(ours(ids).logits, trained(ids).logits, atol=1e-3)
    is_one = "use_dora" not in config and "ensure_weight_tying" in config
    assert ("lm_head.weight" not in read(out)) == is_one


def test_adapters_as_one_adapter(place: Path) -> None:
    """PEFT loads the sum of two, of other ranks and modules, and it does what both do."""
    model = base(place, llama)
    patterns = {"layers.1.self_attn.q_proj": 3}
    config = targets(*LINEAR, lora_alpha=6, rank_pattern=patterns)
    one = train(place, llama, "sum-one", **config)
    two = train(place, llama, "sum-two", **targets("q_proj", r=2, use_rslora=True))
    oxmerge.join_adapters(place / "sum", [one, f"{two}=-0.5"])
    together = fuse(f"{model}+{place / 'sum'}", "float32")
    apart = fuse(f"{model}+{one}+{two}=-0.5", "float32")
    exact = read(merged_by_peft(place, llama, place / "sum", torch.float64))
    for name in exact:
        off = bound({"r": 6}, exact[name])
        assert (together[name].double() - exact[name]).abs().max() <= off, name
        assert (together[name] - apart[name]).abs().max() <= 2 * off, name
    dora = train(place, llama, "sum-dora", **targets("q_proj", use_dora=True))
    with pytest.raises(oxmerge.UnsupportedError, match="more than pairs of factors"):
        oxmerge.join_adapters(place / "no-sum", [one, dora])
    assert not (place / "no-sum").exists()
    with pytest.raises(FileExistsError):
        oxmerge.join_adapters(place / "sum", [one])


def test_a_joined_adapter_names_its_modules_and_no_others(place: Path) -> None:
    """PEFT puts a pair on every module that the config names, and cannot merge some of those."""
    name = "feature_extractor.conv_layers.1.conv"  # another `conv` is in groups
    model, config = base(place, convolutions), targets("conv_layers.1.conv", "q_proj")
    folder = train(place, convolutions, "joined-convolution", **config)
    oxmerge.join_adapters(place / "joined-of-one", [folder])
    exact = read(merged_by_peft(place, convolutions, place / "joined-of-one", torch.float64))
    ours = fuse(f"{model}+{folder}", "float32")[f"wav2vec2.{name}.weight"]
    assert (exact[f"wav2vec2.{name}.weight"] - ours).abs().max() < 1e-5
    for at, layers in enumerate((0, [1])):  # a number, or a list
        one = targets("q_proj", layers_to_transform=layers)
        folder = train(place, llama, f"joined-layer-{at}", **one)
        oxmerge.join_adapters(place / f"joined-layers-{at}", [folder])
        said = peft.LoraConfig.from_pretrained(place / f"joined-layers-{at}")
        assert said.target_modules == {f"model.layers.{at}.self_attn.q_proj"}


def test_a_base_that_lies_otherwise(place: Path) -> None:
    """An adapter does the same to a file of torch whose tensors are transposed views."""
    model = base(place, llama)
    adapter = train(place, llama, "on-views", **targets(*LINEAR, use_dora=True))
    views = place / "views"
    views.mkdir()
    (views / "config.json").write_text((model / "config.json").read_text())
    tensors = {
        name: each.mT.contiguous().mT if each.ndim > 1 else each
        for name, each in read(model).items()
    }
    torch.save(tensors, views / "pytorch_model.bin")
    on_views, plain = fuse(f"{views}+{adapter}"), fuse(f"{model}+{adapter}")
    for name in plain:
        assert torch.equal(on_views[name], plain[name]), name


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"trainable_token_indices": [3, 1]}])
def test_an_adapter_more_exact_than_its_model(place: Path, config: dict[str, Any]) -> None:
    """Numbers of f64 are rounded to what the model is computed in."""
    model = base(place, llama)
    adapter = train(place, llama, f"double-{len(str(config))}", **targets(*LINEAR, **config))
    double = place / f"{adapter.name}-f64"
    shutil.copytree(adapter, double)
    factors = safetensors_torch.load_file(adapter / "adapter_model.safetensors")
    factors = {name: each.double() for name, each in factors.items()}
    safetensors_torch.save_file(factors, double / "adapter_model.safetensors")
    single, wide = (fuse(f"{model}+{each}", "float32") for each in (adapter, double))
    for name in single:
        assert torch.equal(single[name], wide[name]), name


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_whose_start_was_converted(place: Path, start: str) -> None:
    """What has changed the base at the start is in the adapter when it is saved; else refused."""
    model = base(place, llama)
    trained = load(model, llama, torch.float32)
    config = peft.LoraConfig(**targets("q_proj", "up_proj", init_lora_weights=start))
    trained = peft.get_peft_model(trained, config)
    trained.peft_config["default"].init_lora_weights = True
    trained.save_pretrained(place / f"{start}-start")
    trained.peft_config["default"].init_lora_weights = start
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.save_pretrained(place / start)
    with pytest.raises(oxmerge.UnsupportedError, match="whose start has changed its base"):
        fuse(f"{model}+{place / start}")
    where = str(place / f"{start}-start")
    trained.save_pretrained(place / start, path_initial_model_for_weight_conversion=where)
    ours = fuse(f"{model}+{place / start}", "float32")
    theirs = trained.merge_and_unload().state_dict()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-4), name


def test_an_adapter_of_tokens_alone(place: Path) -> None:
    """PEFT's type of adapters that are rows of an embedding, and nothing else."""
    model = base(place, llama)
    trained = load(model, llama, torch.float32)
    config = peft.TrainableTokensConfig(token_indices=[5, 2], target_modules=["embed_tokens"])
    trained = peft.get_peft_model(trained, config)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    trained.save_pretrained(place / "tokens")
    ours = fuse(f"{model}+{place / 'tokens'}", "float32")
    theirs = trained.merge_and_unload().state_dict()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def tokenizer(folder: Path, tokens: int) -> None:
    """Write a tokenizer of so many tokens."""
    vocabulary = {f"w{at}": at for at in range(tokens)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def test_an_adapter_with_new_tokens(place: Path) -> None:
    """The output has its tokenizer, a row for each token, and gives what PEFT's model gives."""
    model, folder, tokens = place / "small", place / "larger", 43
    if not model.exists():
        shutil.copytree(base(place, llama), model)
    tokenizer(model, 40)
    grown = load(model, llama, torch.float32)
    grown.resize_token_embeddings(tokens, mean_resizing=False)
    config = targets("q_proj", modules_to_save=["embed_tokens", "lm_head"])
    grown = peft.get_peft_model(grown, peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in grown.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    grown.save_pretrained(folder)
    reference = f"{model}+{folder}"
    recipe = {"merge_method": "passthrough", "models": [{"model": reference}], "dtype": "float32"}
    told = [each.message for each in oxmerge.plan(recipe).warnings]
    assert told == ["an adapter has rows for other tokens, and no tokenizer beside it"]
    tokenizer(folder, tokens)
    assert not oxmerge.plan(recipe).warnings
    oxmerge.merge(recipe, place / "with-new-tokens")
    made = transformers.AutoTokenizer.from_pretrained(place / "with-new-tokens")
    ids = made("w3 w42 w41")["input_ids"]
    assert ids == [3, 42, 41]
    ours = load(place / "with-new-tokens", llama, torch.float32)
    assert ours.config.vocab_size == tokens
    expected = grown.merge_and_unload()(torch.tensor([ids])).logits
    assert torch.allclose(ours(torch.tensor([ids])).logits, expected, atol=1e-4)
    # One of the two tensors is as it was: no tokenizer fits.
    file = folder / "adapter_model.safetensors"
    left = {name: each for name, each in safetensors_torch.load_file(file).items()
            if "lm_head" not in name}  # fmt: skip
    safetensors_torch.save_file(left, file)
    with pytest.raises(oxmerge.PlanError, match="another vocabulary tensor has none"):
        oxmerge.plan(recipe)


def two_adapters(place: Path) -> tuple[Path, Path]:
    """Return the folders of two adapters of one rank, with other scales and other numbers."""
    modules = (*LINEAR, "embed_tokens")
    one = train(place, llama, "merged-one", **targets(*modules, lora_alpha=6))
    two = train(place, llama, "merged-two", **targets(*modules, lora_alpha=3, use_rslora=True))
    file = two / "adapter_model.safetensors"
    tensors = safetensors_torch.load_file(file)
    for name in tensors:
        if "lora" in name:
            tensors[name] += torch.randn_like(tensors[name]) * 0.3
    safetensors_torch.save_file(tensors, file)
    return one, two


def of_adapters(method: str, one: Path, two: Path, **parameters: Any) -> dict[str, Any]:
    models = [
        {"model": str(one), "parameters": {"weight": 0.75}},
        {"model": str(two), "parameters": {"weight": -0.5}},
    ]
    return {"merge_method": method, "models": models, "parameters": parameters}


@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_adapters_merged_by_factors(place: Path, method: str) -> None:
    """What PEFT makes of two adapters, to the bit; and PEFT loads what is made here."""
    one, two = two_adapters(place)
    out = place / f"merged-{method}"
    report = oxmerge.merge(of_adapters(method, one, two, density=0.6), out)
    model = load(base(place, llama), llama, torch.float32)
    model = peft.PeftModel.from_pretrained(model, one, adapter_name="one")
    model.load_adapter(two, "two")
    weights = [0.75, -0.5]
    model.add_weighted_adapter(["one", "two"], weights, "x", combination_type=method, density=0.6)
    model.save_pretrained(place / "by-peft", selected_adapters=["x"])
    ours, theirs = read(out), read(place / "by-peft" / "x")
    assert ours.keys() == theirs.keys()
    assert report.tensors == len(ours)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    model.load_adapter(out, "ours")
    assert (out / "oxmerge_recipe.yml").read_text().lstrip().startswith("{")


@pytest.mark.parametrize(
    ("method", "shares"), [("linear", (3, -2)), ("task_arithmetic", (0.75, -0.5))]
)
def test_sums_of_adapters_are_exact(place: Path, method: str, shares: tuple[float, float]) -> None:
    """The adapter does to the model what the method does to models with one adapter each."""
    one, two = two_adapters(place)
    model, out = base(place, llama), place / f"merged-{method}"
    oxmerge.merge(of_adapters(method, one, two), out)
    together = fuse(f"{model}+{out}", "float32")
    apart = fuse(f"{model}+{one}={shares[0]}+{two}={shares[1]}", "float32")
    for name in apart:
        off = bound({"r": 16}, apart[name].double()) + 2**-22
        assert (together[name] - apart[name]).abs().max() <= off, name


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_adapters_thinned_at_random(place: Path, method: str) -> None:
    """Each number is what the kept ones of both adapters make; draws depend on the seed alone."""
    one, two = two_adapters(place)
    recipe = of_adapters(method, one, two, density=0.5)
    for seed in (0, 0, 1):
        oxmerge.merge(recipe, place / f"{method}-{seed}", seed=seed, overwrite=True)
    first, other = read(place / f"{method}-0"), read(place / f"{method}-1")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    assert not torch.equal(first[name], other[name])
    scales = (0.75 * 6 / 4, -0.5 * 3 / 2)
    parts = [
        2 * read(folder)[name] * (abs(scale) ** 0.5 * (1 if scale > 0 else -1))
        for folder, scale in zip((one, two), scales, strict=True)
    ]
    zero = torch.zeros_like(parts[0])
    made = [zero, parts[0], parts[1], parts[0] + parts[1]]
    if method == "dare_ties":  # those of one sign are averaged
        made[3] = made[3] / 2
    distance = torch.stack([(first[name] - each).abs() for each in made])
    assert distance.min(0).values.max() <= 4 * F32 * max(each.abs().max() for each in made)
    assert 0.3 < (distance[0] > 0).float().mean() < 0.95


def test_adapters_that_cannot_be_merged(place: Path) -> None:
    """All that is wrong is told at once, and nothing is written."""
    one, two = two_adapters(place)
    three = train(place, llama, "merged-three", **targets("q_proj", r=3))
    out = place / "merged-not"
    with pytest.raises(oxmerge.UnsupportedError, match="`ties_svd`, which cuts the rank"):
        oxmerge.merge(of_adapters("ties_svd", one, two), out)
    with pytest.raises(oxmerge.PlanError, match="takes factors of one rank"):
        oxmerge.merge(of_adapters("ties", one, three), out)
    with pytest.raises(oxmerge.PlanError, match="`density` is from 0 to 1"):
        oxmerge.merge(of_adapters("ties", one, two, density=60), out)
    with pytest.raises(oxmerge.PlanError, match="the option `hash_inputs` has no effect"):
        oxmerge.merge(of_adapters("ties", one, two), out, hash_inputs=True)
    with pytest.raises(oxmerge.MemoryBudgetError, match="do not fit the memory budget"):
        oxmerge.merge(of_adapters("ties", one, two), out, memory=1)
    with pytest.raises(oxmerge.UnsupportedError, match="to plan a merge of adapters"):
        oxmerge.plan(of_adapters("ties", one, two))
    mixed = of_adapters("linear", one, base(place, llama))
    with pytest.raises(oxmerge.UnsupportedError, match="this is an adapter"):
        oxmerge.merge(mixed, out)
    assert not out.exists()
    with pytest.raises(oxmerge.OutputError, match="would replace an adapter that is read"):
        oxmerge.merge(of_adapters("ties", one, two), one, overwrite=True)


def test_transformers_loads_a_fused_model(place: Path) -> None:
    """Its logits are those of PEFT's own merge, as close as one rounding of the weights allows."""
    model = base(place, llama)
    adapter = train(place, llama, "loaded", **targets(*LINEAR, use_rslora=True))
    report = oxmerge.fuse(model, place / "fused", [adapter])
    assert report.tensors == len(read(model))
    ours = load(place / "fused", llama, torch.float32)
    merged = load(model, llama, torch.float32)
    theirs = peft.PeftModel.from_pretrained(merged, adapter).merge_and_unload()
    rounded = theirs.to(torch.bfloat16).to(torch.float32)
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        found, expected = ours(tokens).logits, rounded(tokens).logits
    # Weights at a tie may be rounded the other way, and few are.
    assert (found - expected).abs().max() <= BF16 * expected.abs().max() / 4
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
