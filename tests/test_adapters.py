"""Adapters on models, against PEFT itself: it makes each variant and merges it, in f64.

An adapter is right if the model with it is what PEFT makes of both, rounded once. In f32 the sum
over the rank may be off by a rounding a step; in bf16 by one rounding more.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import oxmerge
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

if TYPE_CHECKING:
    from collections.abc import Callable

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


def gpt_oss() -> Any:
    """Experts are one parameter in files, too, which is stored transposed."""
    config = transformers.GptOssConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, head_dim=4,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


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

#: What PEFT can make: the model, and the adapter's config.
VARIANTS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "linear": (llama, {"r": 4, "lora_alpha": 10, "target_modules": LINEAR}),
    "all-linear": (llama, {"r": 3, "target_modules": "all-linear"}),
    "rank 1": (llama, {"r": 1, "lora_alpha": 0.5, "target_modules": ["q_proj"]}),
    "rslora": (llama, {"r": 8, "use_rslora": True, "target_modules": LINEAR}),
    "patterns": (
        llama,
        {
            "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6, "model.*.k_proj": 3},
            "alpha_pattern": {r"layers\.0\..*": 5, "down_proj": 1, "q_proj": 100},
        },
    ),
    "dora": (llama, {"r": 4, "use_dora": True, "target_modules": LINEAR}),
    "dora rslora": (llama, {"r": 4, "use_dora": True, "use_rslora": True, "target_modules": ["up_proj"]}),
    "embeddings": (llama, {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "dora embeddings": (llama, {"r": 4, "use_dora": True, "target_modules": ["embed_tokens", "v_proj"]}),
    "saved": (llama, {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]}),
    "rows": (llama, {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 39]}),
    "rows by name": (
        llama,
        {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 0]}},
    ),
    "bias all": (qwen2, {"r": 2, "target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "bias lora_only": (qwen2, {"r": 2, "target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora_bias": (qwen2, {"r": 2, "target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "tied embedding": (qwen2, {"r": 2, "target_modules": ["embed_tokens", "v_proj"]}),
    "conv1d": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d, flag off": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": False}),
    "conv1d dora": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "convolution": (convolutions, {"r": 4, "target_modules": ["conv_layers.1.conv", "q_proj"]}),
    "convolution 2d": (vision, {"r": 4, "target_modules": ["projection"]}),
    "convolution 2d dora": (vision, {"r": 4, "target_modules": ["projection"], "use_dora": True}),
    "experts": (
        mixtral,
        {
            "r": 2, "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "experts, one parameter": (
        mixtral, {"r": 2, "target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    ),
    "experts, transposed": (
        gpt_oss,
        {
            "r": 2, "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "gaussian": (llama, {"r": 4, "init_lora_weights": "gaussian", "target_modules": ["q_proj"]}),
}  # fmt: skip


@cache
def bases() -> dict[str, Path]:
    return {}


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


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_what_peft_makes_of_it(name: str, place: Path) -> None:
    make, config = VARIANTS[name]
    model = base(place, make)
    adapter = train(place, make, name, **config)
    exact = read(merged_by_peft(place, make, adapter, torch.float64))
    before = read(model)
    single = fuse(f"{model}+{adapter}", "float32")
    half = fuse(f"{model}+{adapter}")
    assert set(single) == set(half) == set(exact)
    changed = 0
    for key, expected in exact.items():
        # A rounding for each step of the rank and for each factor, of numbers no larger than these.
        largest = (
            max(expected.abs().max().item(), before[key].abs().max().item())
            if key in before
            else 1.0
        )
        bound = 64 * F32 * max(largest, 1.0) * 4
        assert (single[key].double() - expected).abs().max() <= bound, key
        rounding = expected.abs() * BF16 + bound
        assert half[key].dtype == torch.bfloat16
        assert ((half[key].double() - expected).abs() <= rounding).all(), key
        changed += key not in before or not torch.equal(expected, before[key].double())
    assert changed > 0
