"""What is written of each class: normalisers as the pipelines apply them, refused configs, the released configs."""

import inspect
import json

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch

from models.encoders import describe, load_encoder
from models.errors import CheckpointError
from models.pretrained.directory import RULES
from models.pretrained.released import real_configs
from models.pretrained.rules import EncoderRule
from tests.pretrained_models import STREAMED, WHOLE, Case, Saved

EVERY = {name: case for name, case in {**STREAMED, **WHOLE}.items() if name != "ours"}


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """The card of every class, and its module."""
    found = {}
    for name, case in EVERY.items():
        saved = Saved(case, tmp_path_factory.mktemp("encoder") / name)
        found[name] = saved.encoder.card, saved.module
    return found


def per_channel(values):
    return torch.tensor(values).view(1, -1, 1, 1, 1)


PIPELINES = {
    "wan-2.1": lambda z, vae: (z - per_channel(vae.config.latents_mean)) / per_channel(vae.config.latents_std),
    "qwen-image": lambda z, vae: (z - per_channel(vae.config.latents_mean)) / per_channel(vae.config.latents_std),
    "ltx-0.9": lambda z, vae: (z - vae.latents_mean.view(1, -1, 1, 1, 1)) * 0.5 / vae.latents_std.view(1, -1, 1, 1, 1),
    "ltx-2": lambda z, vae: (z - vae.latents_mean.view(1, -1, 1, 1, 1)) * 0.5 / vae.latents_std.view(1, -1, 1, 1, 1),
    "mochi": lambda z, vae: (z - per_channel(vae.config.latents_mean)) / per_channel(vae.config.latents_std) * 0.5,
    "cogvideox": lambda z, _: z * 1.15258426,
    "hunyuanvideo": lambda z, _: z * 0.476986,
    "hunyuanvideo-1.5": lambda z, _: z * 1.03682,
    "easyanimate": lambda z, _: z * 0.7125,
    "kl-image": lambda z, _: (z - 0.25) * 0.5,
    "dc-image": lambda z, _: z * 0.5,
    "vidtok-kl": lambda z, _: z,
    "cosmos": lambda z, _: z,
}


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_normalisers_are_read_as_the_pipelines_apply_them(cards, name):
    card, vae = cards[name]
    latent = torch.randn(1, card.geometry.channels, 2, 1, 1)
    normaliser = card.normaliser
    normalised = (latent - per_channel(normaliser.mean)) / per_channel(normaliser.std)
    torch.testing.assert_close(normalised, PIPELINES[name](latent, vae))


def test_an_identity_says_why(cards):
    assert cards["vidtok-kl"][0].normaliser.formula == "identity, the model has none"
    assert "per channel and latent frame" in cards["cosmos"][0].normaliser.formula


def test_an_image_model_with_statistics_uses_them(tmp_path):
    config = {**STREAMED["kl-image"].config, "latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}
    normaliser = Saved(Case("AutoencoderKL", config, (1, 8)), tmp_path).encoder.card.normaliser
    assert normaliser.mean == (0.5,) * 4
    assert normaliser.std == (2.0 / 0.5,) * 4


def test_a_scaling_factor_changes_no_latent_and_no_fingerprint(tmp_path):
    saved = Saved(WHOLE["hunyuanvideo"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.25}))
    card = describe(str(tmp_path))
    assert card.fingerprint == saved.encoder.card.fingerprint
    assert card.normaliser.std == (4.0,) * 4


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vidtok-kl", {"is_causal": False}, "only the causal VidTok models"),
        ("easyanimate", {"spatial_group_norm": False}, "lets later frames into earlier latents"),
        ("ltx-2", {"encoder_causal": False}, "only a causal LTX encoder"),
        ("ltx-0.9", {"patch_size_t": 2}, "only a causal LTX encoder with patch_size_t 1"),
    ],
)
def test_configs_that_break_the_rules_are_refused(tmp_path, name, change, message):
    saved = Saved(STREAMED[name], tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), **change}
    (saved.directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load_encoder(str(tmp_path))


def test_classes_that_stream_are_the_causal_ones(cards):
    for card, _ in cards.values():
        assert (RULES[card.kind].streamed is not None) == (card.geometry.causality == "causal")


def test_a_rule_is_of_one_way_to_run():
    rule = RULES["AutoencoderKLMochi"]
    with pytest.raises(ValueError, match="one of streamed and whole"):
        EncoderRule(rule.geometry, rule.normaliser)


RELEASED = {
    "wan-2.1": (4, 8, 16),
    "wan-2.2": (4, 16, 48),
    "qwen-image": (4, 8, 16),
    "ltx-0.9": (8, 32, 128),
    "ltx-0.9.5": (8, 32, 128),
    "ltx-2": (8, 32, 128),
    "vidtok-kl": (4, 8, 4),
    "vidtok-fsq": (4, 8, 6),
    "easyanimate": (4, 8, 16),
    "hunyuanvideo": (4, 8, 16),
    "hunyuanvideo-1.5": (4, 16, 32),
    "cogvideox-2b": (4, 8, 16),
    "cosmos-cv8x8x8": (8, 8, 16),
    "mochi-1": (6, 8, 12),
    "flux": (1, 8, 16),
    "sd": (1, 8, 4),
    "dc-ae-f32": (1, 32, 32),
}


def test_every_class_has_a_released_config():
    assert {class_name for class_name, _ in real_configs().values()} == RULES.keys()
    assert real_configs().keys() == RELEASED.keys()


@pytest.mark.parametrize("name", sorted(RELEASED))
def test_a_released_config_has_the_geometry_that_it_is_known_for(name):
    class_name, arguments = real_configs()[name]
    model_class = getattr(diffusers, class_name)
    defaults = {key: value.default for key, value in inspect.signature(model_class).parameters.items()}
    assert arguments.keys() <= defaults.keys()
    geometry = RULES[class_name].geometry({**defaults, **arguments})
    assert (geometry.temporal_stride, geometry.spatial_stride, geometry.channels) == RELEASED[name]


@pytest.mark.parametrize("name", sorted(RELEASED.keys() - {"vidtok-fsq"}))  # FSQ reads a tensor while it is built
def test_a_released_config_can_be_built(name):
    class_name, arguments = real_configs()[name]
    with torch.device("meta"):
        module = getattr(diffusers, class_name)(**arguments)
    normaliser_channels = module.config.get("latents_mean") or ()
    assert sum(weight.numel() for weight in module.parameters()) > 50_000_000
    assert len(normaliser_channels) in {0, RELEASED[name][2], 16 * RELEASED[name][2]}
