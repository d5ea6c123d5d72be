"""The learned prior over codes: causal, learns, samples what it learned, and is bound to its autoencoder."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.errors import CheckpointError
from models.generative.prior import CodePrior, draw
from models.generative.prior_checkpoint import load_prior, save_prior
from models.generative.prior_config import PriorConfig
from models.generative.prior_training import PriorSettings, TrainedPrior, measure_bits_per_code, train_prior

ONE_LEVEL = PriorConfig(((7,),), ((3, 4, 4),), width=32, depth=2, heads=4)
TWO_LEVELS = PriorConfig(((5, 3), (6,)), ((2, 2, 2), (3, 4, 4)), width=32, depth=2, heads=2)
BOTH = pytest.mark.parametrize("config", [ONE_LEVEL, TWO_LEVELS], ids=["one level", "two levels"])


def random_prior(config: PriorConfig, seed: int = 0) -> CodePrior:
    """Far from uniform, so that every code depends on all before it."""
    torch.manual_seed(seed)
    prior = CodePrior(config)
    torch.nn.init.normal_(prior.to_logits.weight, std=0.5)
    torch.nn.init.normal_(prior.code.weight, std=1.0)
    return prior.eval().requires_grad_(False)


def random_grids(config: PriorConfig, extents: list[tuple[int, int, int]], clips: int = 2) -> list[Tensor]:
    return [
        torch.stack([torch.randint(size, (clips, *extent)) for size in sizes], dim=1)
        for sizes, extent in zip(config.codebook_sizes, extents, strict=True)
    ]


def in_order(config: PriorConfig, extents: list[tuple[int, int, int]]) -> list[tuple[int, int, int, int, int]]:
    """(level, codebook, t, h, w) of every code, as the prior's docstring says it goes."""
    return [
        (level, book, *place)
        for level, (sizes, extent) in enumerate(zip(config.codebook_sizes, extents, strict=True))
        for *place, book in itertools.product(*map(range, extent), range(len(sizes)))
    ]


def logits_by_code(prior: CodePrior, grids: list[Tensor]) -> list[Tensor]:
    """The logits of every code, B K each, in order."""
    books = [(level, book) for level, sizes in enumerate(prior.config.codebook_sizes) for book in range(len(sizes))]
    logits = dict(zip(books, prior(grids), strict=True))
    extents = [tuple(grid.shape[2:]) for grid in grids]
    return [logits[level, book][:, :, t, h, w] for level, book, t, h, w in in_order(prior.config, extents)]


class TestCausality:
    @BOTH
    def test_a_code_reaches_all_later_ones_and_neither_itself_nor_earlier_ones(self, config: PriorConfig) -> None:
        prior = random_prior(config)
        grids = random_grids(config, list(config.max_extents))
        places = in_order(config, list(config.max_extents))
        before = logits_by_code(prior, grids)
        for changed in range(0, len(places), 5):
            level, book, t, h, w = places[changed]
            other = [grid.clone() for grid in grids]
            other[level][:, book, t, h, w] = (other[level][:, book, t, h, w] + 1) % config.codebook_sizes[level][book]
            leaks = [
                (new - old).abs().max().item() for new, old in zip(logits_by_code(prior, other), before, strict=True)
            ]
            assert leaks[: changed + 1] == [0.0] * (changed + 1)
            assert min(leaks[changed + 1 :], default=1) > 0

    def test_codes_of_an_untrained_prior_are_uniform(self) -> None:
        grids = random_grids(TWO_LEVELS, list(TWO_LEVELS.max_extents))
        nats = CodePrior(TWO_LEVELS).nats(grids)
        assert nats.shape == (2, TWO_LEVELS.num_codes(TWO_LEVELS.max_extents)) == (2, 2 * 8 + 48)
        expected = torch.tensor([5.0] * 8 + [3.0] * 8 + [6.0] * 48).log()
        torch.testing.assert_close(nats[0], expected)


class TestSampling:
    @BOTH
    @pytest.mark.parametrize("top_k", [None, 2])
    def test_with_kept_keys_equals_the_plain_loop(self, config: PriorConfig, top_k: int | None) -> None:
        prior, extents = random_prior(config), [(2, 2, 2), (2, 3, 4)][-len(config.codebook_sizes) :]
        sampled = prior.sample(3, extents, temperature=0.7, top_k=top_k, generator=torch.Generator().manual_seed(5))
        plain = [torch.zeros(3, len(sizes), *extent, dtype=torch.int64)
                 for sizes, extent in zip(config.codebook_sizes, extents, strict=True)]  # fmt: skip
        generator = torch.Generator().manual_seed(5)
        for position, (level, book, t, h, w) in enumerate(in_order(config, extents)):
            logits = logits_by_code(prior, plain)[position]
            plain[level][:, book, t, h, w] = draw(logits, 0.7, top_k, generator)
        for fast, slow in zip(sampled, plain, strict=True):
            assert torch.equal(fast, slow)
        assert len(sampled[0].unique()) > 1

    def test_a_seed_repeats_and_another_differs(self) -> None:
        prior = random_prior(ONE_LEVEL)
        one, same, other = (
            prior.sample(2, [(2, 3, 4)], generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_draw_follows_the_probabilities(self) -> None:
        logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(20_000, -1)
        shares = torch.bincount(draw(logits, 1.0, None, torch.Generator().manual_seed(0)), minlength=4) / 20_000
        torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.125, 0.125]), atol=0.015, rtol=0)
        colder = torch.bincount(draw(logits, 0.5, None, torch.Generator().manual_seed(0)), minlength=4) / 20_000
        torch.testing.assert_close(colder, torch.tensor([16.0, 4, 1, 1]) / 22, atol=0.015, rtol=0)
        likeliest = draw(logits, 1.0, 2, torch.Generator().manual_seed(0))
        assert set(likeliest.tolist()) == {0, 1}

    @pytest.mark.parametrize(
        ("extents", "options", "told"),
        [
            ([(4, 4, 4)], {}, "4x4x4 does not fit into 3x4x4"),
            ([(1, 1, 1), (1, 1, 1)], {}, "over 1 levels of codes, got 2"),
            ([(1, 1, 1)], {"temperature": 0.0}, "temperature must be positive"),
            ([(1, 1, 1)], {"top_k": 0}, "top_k at least 1"),
        ],
    )
    def test_what_cannot_be_is_refused(self, extents: list, options: dict, told: str) -> None:
        with pytest.raises(ValueError, match=told):
            CodePrior(ONE_LEVEL).sample(1, extents, **options)


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        (torch.zeros(1, 2, 1, 1, 1, dtype=torch.int64), "is B 1 t h w here"),
        (torch.full((1, 1, 1, 1, 1), 7), "codes are from 0 to below"),
        (torch.full((1, 1, 1, 1, 1), -1), "codes are from 0 to below"),
        (torch.zeros(1, 1, 1, 5, 1, dtype=torch.int64), "does not fit"),
    ],
)
def test_grids_that_do_not_fit_are_refused(grid: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        CodePrior(ONE_LEVEL)([grid])


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"codebook_sizes": ()}, "at least 2"),
        ({"codebook_sizes": ((1,),)}, "at least 2"),
        ({"codebook_sizes": ((2**21,),)}, "at most"),
        ({"max_extents": ()}, "for each of 1 levels"),
        ({"max_extents": ((0, 1, 1),)}, "at least 1"),
        ({"heads": 3}, "heads divides width"),
    ],
)
def test_a_config_that_cannot_be(fields: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PriorConfig(**{"codebook_sizes": ((4,),), "max_extents": ((1, 1, 1),), **fields})


CYCLE = 6


def cycles(seed: int, clips: int = 16) -> Iterator[list[Tensor]]:
    """Codes that count up by one from place to place, from a random start; at every frame a fair coin may turn them.

    Per clip log2(6) bits for the start and one per later frame; all other codes follow.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(CYCLE, (clips, 1, 1, 1), generator=generator)
        turned = torch.randint(2, (clips, 2, 1, 1), generator=generator) * (CYCLE // 2)
        turned[:, 0] = 0
        steps = torch.arange(3)[:, None] + torch.arange(4)
        yield [((start + turned + steps) % CYCLE)[:, None]]


ENTROPY_BITS = (math.log2(CYCLE) + 1) / (2 * 3 * 4)


@pytest.fixture(scope="module")
def counted() -> TrainedPrior:
    config = PriorConfig(((CYCLE,),), ((2, 3, 4),), width=48, depth=2, heads=4)
    return train_prior(config, cycles(0), steps=500, settings=PriorSettings(learning_rate=3e-3))


class TestTraining:
    def test_bits_per_code_fall_to_the_entropy(self, counted: TrainedPrior) -> None:
        bits = measure_bits_per_code(counted.prior, itertools.islice(cycles(1), 8))
        assert ENTROPY_BITS * 0.95 < bits < ENTROPY_BITS * 1.15
        assert bits < 0.1 * math.log2(CYCLE)
        assert counted.steps == 500
        assert counted.bits_per_code == pytest.approx(bits, rel=0.2)

    def test_samples_obey_the_pattern(self, counted: TrainedPrior) -> None:
        (grid,) = counted.prior.sample(64, [(2, 3, 4)], generator=torch.Generator().manual_seed(0))
        assert grid.shape == (64, 1, 2, 3, 4)
        steps = torch.arange(3)[:, None] + torch.arange(4)
        offsets = (grid[:, 0] - steps) % CYCLE
        whole = (offsets == offsets[:, :, :1, :1]).flatten(1).all(dim=1)
        assert whole.float().mean() > 0.95
        turns = (offsets[whole, 1, 0, 0] - offsets[whole, 0, 0, 0]) % CYCLE
        assert set(turns.tolist()) == {0, CYCLE // 2}
        assert set(offsets[whole, 0, 0, 0].tolist()) == set(range(CYCLE))

    def test_is_repeatable_and_leaves_the_global_seed_alone(self) -> None:
        def weights() -> dict[str, Tensor]:
            return train_prior(ONE_LEVEL, iter_of(ONE_LEVEL), steps=3).prior.state_dict()

        first = weights()
        state = torch.get_rng_state()
        second = weights()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(parameter.abs().sum() > 0 for parameter in (first["to_logits.weight"],))

    def test_two_levels_of_several_sizes(self) -> None:
        trained = train_prior(TWO_LEVELS, iter_of(TWO_LEVELS, [(1, 1, 2), (2, 2, 2)]), steps=2)
        assert not trained.prior.training
        assert measure_bits_per_code(
            trained.prior, [random_grids(TWO_LEVELS, [(2, 2, 2), (3, 4, 4)])]
        ) == pytest.approx((8 * math.log2(15) + 48 * math.log2(6)) / 64, rel=0.1)

    def test_the_clock_ends_it(self) -> None:
        calls = list[int]()
        trained = train_prior(
            ONE_LEVEL, iter_of(ONE_LEVEL), time_limit_seconds=0.05, progress=lambda step, _: calls.append(step)
        )
        assert calls == list(range(1, trained.steps + 1))

    def test_what_cannot_be_is_refused(self) -> None:
        with pytest.raises(ValueError, match="positive limit"):
            train_prior(ONE_LEVEL, iter_of(ONE_LEVEL))
        with pytest.raises(ValueError, match="ran out"):
            train_prior(ONE_LEVEL, iter([]), steps=1)
        with pytest.raises(ValueError, match="learning_rate must be positive"):
            PriorSettings(learning_rate=0)
        with pytest.raises(ValueError, match="at least one batch"):
            measure_bits_per_code(CodePrior(ONE_LEVEL), [])


def iter_of(config: PriorConfig, extents: list[tuple[int, int, int]] | None = None) -> Iterator[list[Tensor]]:
    torch.manual_seed(3)
    grids = random_grids(config, extents or list(config.max_extents))
    return itertools.repeat(grids)


class TestCheckpoint:
    @BOTH
    def test_round_trip(self, config: PriorConfig, tmp_path: Path) -> None:
        prior = random_prior(config)
        fingerprint = save_prior(tmp_path / "prior", prior, "a" * 64)
        loaded = load_prior(tmp_path / "prior", "a" * 64)
        assert loaded.config == config
        assert not loaded.training
        grids = random_grids(config, list(config.max_extents))
        assert torch.equal(loaded.nats(grids), prior.nats(grids))
        assert sorted(path.name for path in (tmp_path / "prior").iterdir()) == ["config.json", "model.safetensors"]
        assert json.loads((tmp_path / "prior/config.json").read_text())["fingerprint"] == fingerprint
        assert [path.name for path in tmp_path.iterdir()] == ["prior"]

    def test_of_another_autoencoder_is_refused_by_name(self, tmp_path: Path) -> None:
        save_prior(tmp_path / "prior", random_prior(ONE_LEVEL), "a" * 64)
        with pytest.raises(
            CheckpointError, match="over the codes of the autoencoder aaaaaaaaaaaa, not of bbbbbbbbbbbb"
        ):
            load_prior(tmp_path / "prior", "b" * 64)

    def test_nothing_is_overwritten(self, tmp_path: Path) -> None:
        save_prior(tmp_path / "prior", random_prior(ONE_LEVEL), "a" * 64)
        with pytest.raises(CheckpointError, match="exists already"):
            save_prior(tmp_path / "prior", random_prior(ONE_LEVEL), "a" * 64)

    @pytest.mark.parametrize(
        ("file", "old", "new", "told"),
        [
            ("config.json", b"aaaa", b"bbbb", "does not match its own sha256"),
            ("config.json", b"latentmill.prior", b"latentmill.model", "is not a prior of ours"),
            ("config.json", b'"format_version": 1', b'"format_version": 9', "format version 9"),
            ("config.json", b"{", b"", "is not JSON"),
            ("model.safetensors", None, b"", "does not match|is not the file|cut short"),
            ("model.safetensors", b"start", b"stara", "safetensors|is not the file"),
        ],
    )
    def test_a_damaged_file_is_refused_by_name(
        self, file: str, old: bytes | None, new: bytes, told: str, tmp_path: Path
    ) -> None:
        save_prior(tmp_path / "prior", random_prior(ONE_LEVEL), "a" * 64)
        path = tmp_path / "prior" / file
        data = path.read_bytes()
        path.write_bytes(data[:-1] if old is None else data.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=told) as caught:
            load_prior(tmp_path / "prior", "a" * 64)
        assert file in str(caught.value)

    def test_one_flipped_bit_of_the_weights(self, tmp_path: Path) -> None:
        save_prior(tmp_path / "prior", random_prior(ONE_LEVEL), "a" * 64)
        path = tmp_path / "prior/model.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="its fingerprint differs"):
            load_prior(tmp_path / "prior", "a" * 64)

    def test_no_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_prior(tmp_path / "nowhere", "a" * 64)
