"""Settings: what is refused and in which words, overrides, recipes, and the way through JSON."""

import json
import re
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lutq.config import FIELDS, KEEP_BITS, METHODS, STARTS, LayerConfig, QuantConfig, make_config, read_recipe
from lutq.errors import LutqError
from lutq.paths import shipped

RECIPES = sorted(shipped("configs").glob("*.toml"))

OUT_OF_RANGE = [
    *(("bits", value) for value in (0, 5, -1, 16, 3.0, "3", True, None)),
    *(("group", value) for value in (-32, 1, 31, 33, 100, 128.0, "128", False, None)),
    *(("method", value) for value in ("", "gptq", "RTN", 1, None)),
    *(("offsets", value) for value in (0, 1, "yes", None)),
    *(("symmetric", value) for value in (0, 1, "no", None)),
    *(("clip", value) for value in (0, 1.0, "true", None)),
    *(("start", value) for value in ("", "bset", "rtn", 0, None)),
    *(("iterations", value) for value in (-1, 1.5, "15", True, None)),
    *(("tolerance", value) for value in (-1e-9, 1.0, 1, 2.5, float("nan"), float("inf"), "0", True, None)),
    *(("calib", value) for value in (0, None, True)),
    *(("calib_windows", value) for value in (0, -1, 1.5, "64", True, None)),
    *(("calib_length", value) for value in (-1, 1, 1.5, "64", True, None)),
    *(
        (name, value)
        for name in ("seed", "rounds", "sweeps", "low_rank", "learned_scaling", "refine", "distill")
        for value in (-1, 1.5, "1", True, None)
    ),
    *(("outliers", value) for value in (-0.1, 3.1, float("nan"), "0.5", True, None)),
    *((name, value) for name in ("damping", "rate") for value in (-1e-9, 1, 2.5, float("nan"), "0", True, None)),
    *(("target_bpw", value) for value in (-1, 17, float("nan"), "2.5", True, None)),
    *(("target_ms", value) for value in (-1, float("nan"), float("inf"), "2.5", True, None)),
    *(("groups", value) for value in (64, None, True, "32,", "a", "32 64")),
    *((name, value) for name in ("flips", "end_loss") for value in (0, 1, "yes", None)),
    *(("head_bits", value) for value in (0, 5, 8, 15, 17, -16, 4.0, "16", True, None)),
    *(("overrides", value) for value in ([], "fc2", None, 3)),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_out_of_range_is_refused(name, value):
    with pytest.raises(LutqError) as caught:
        QuantConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(name), f"{name=} {value=} {message=}"
    assert str(value) in message, f"{name=} {value=} {message=}"


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ({"bits": 0}, ".bits", "0"),
        ({"bits": 5}, ".bits", "5"),
        ({"bits": 16}, ".bits", "16"),
        ({"bits": "4"}, ".bits", "'4'"),
        ({"bits": True}, ".bits", "True"),
        ({"group": 33}, ".group", "33"),
        ({"group": -32}, ".group", "-32"),
        ({"group": None}, ".group", "None"),
        ({"skip": 1}, ".skip", "1"),
        ({"skip": "true"}, ".skip", "'true'"),
        ({"method": "rtn"}, "", "method"),
        ({"bit": 3}, "", "bit"),
        (3, "", "3"),
        (None, "", "None"),
        ([], "", "[]"),
    ],
)
def test_bad_override_is_refused(table, key, value):
    with pytest.raises(LutqError) as caught:
        QuantConfig(overrides={"k_proj": {"bits": 2}, "fc2$": table})
    message = str(caught.value)
    assert message.startswith(f"overrides.'fc2$'{key} "), f"{table=} {message=}"
    assert value in message, f"{table=} {message=}"


@pytest.mark.parametrize("pattern", ["(", "*", "[a", "fc2("])
def test_bad_pattern_is_refused(pattern):
    with pytest.raises(LutqError, match=re.escape(f"overrides.{pattern!r} is not a regular expression")):
        QuantConfig(overrides={pattern: {"bits": 4}})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("bits", bits) for bits in (1, 2, 3, 4)),
        *(("group", group) for group in (0, 32, 96, 1024)),
        *(("method", method) for method in METHODS),
        *(("start", start) for start in STARTS),
        *(("iterations", iterations) for iterations in (0, 1, 1000)),
        *(("tolerance", tolerance) for tolerance in (0.0, 0, 0.999)),
        *(("calib", name) for name in ("books", "c4", "some/file.txt")),
        *(("calib_length", length) for length in (0, 2, 2048)),
        *(
            (name, value)
            for name in ("seed", "rounds", "sweeps", "low_rank", "learned_scaling", "refine", "distill")
            for value in (0, 1, 1000)
        ),
        *(("outliers", value) for value in (0, 0.5, 3)),
        *((name, value) for name in ("damping", "rate") for value in (0.0, 0, 0.999)),
        *((name, value) for name in ("target_bpw", "target_ms") for value in (0, 2.5, 16)),
        *(("head_bits", bits) for bits in (1, 2, 3, 4, KEEP_BITS)),
        ("overrides", {}),
        ("overrides", {"": {}, "fc2$": {"bits": 1, "group": 0, "skip": False}}),
    ],
)
def test_in_range_is_taken(name, value):
    assert getattr(QuantConfig(**{name: value}), name) == value, f"{name=} {value=}"


@pytest.mark.parametrize("stage", ["refine", "distill"])
def test_tuning_needs_a_bcq_grid(stage):
    with pytest.raises(LutqError, match=f"^{stage} tunes BCQ grids and method is 'rtn'"):
        QuantConfig(method="rtn", **{stage: 1})
    assert QuantConfig(**{stage: 1}).calibrated
    assert QuantConfig(method="feedback").calibrated
    assert not QuantConfig().calibrated


@pytest.mark.parametrize("method", ["rtn", "greedy", "alternating"])
def test_end_loss_is_for_feedback(method):
    with pytest.raises(LutqError, match=f"^end_loss weighs the tokens of 'feedback' and method is '{method}'"):
        QuantConfig(method=method, end_loss=True)
    assert QuantConfig(method="feedback", end_loss=True).end_loss


@pytest.mark.parametrize(
    ("groups", "words"),
    [("32,50", "every one of groups must be a multiple of 32.*got 50"), ("-32", "every one of groups.*got -32")],
)
def test_bad_groups(groups, words):
    with pytest.raises(LutqError, match=words):
        QuantConfig(target_bpw=3.0, groups=groups)


def test_groups_are_for_a_budget():
    with pytest.raises(LutqError, match=r"^groups '32,64' are for target_bpw and target_ms to choose from"):
        QuantConfig(groups="32,64")
    for target in ("target_bpw", "target_ms"):
        assert QuantConfig(groups="32, 64,0,32", **{target: 3.0}).group_choices == (32, 64, 0), f"{target=}"


def test_tolerance_becomes_a_float():
    assert type(QuantConfig(tolerance=0).tolerance) is float


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({}, LayerConfig(3, 128, "bcq", True)),
        ({"offsets": False, "symmetric": True}, LayerConfig(3, 128, "bcq", False)),
        ({"method": "greedy", "bits": 2, "group": 0}, LayerConfig(2, 0, "bcq", True)),
        ({"method": "rtn", "offsets": False}, LayerConfig(3, 128, "uniform", True)),
        ({"method": "rtn", "symmetric": True}, LayerConfig(3, 128, "uniform", False)),
    ],
)
def test_layer_without_overrides(settings_, expected):
    assert QuantConfig(**settings_).layer("model.layers.0.fc1") == expected, f"{settings_=}"


def test_a_later_override_wins_key_by_key():
    config = QuantConfig(
        bits=3,
        group=128,
        overrides={r"layers\.0\.": {"bits": 2, "group": 64}, "fc": {"bits": 4}, "fc2$": {"group": 32}, "q_proj": {}},
    )
    for name, bits, group in (
        ("layers.0.fc2", 4, 32),
        ("layers.0.fc1", 4, 64),
        ("layers.0.q_proj", 2, 64),
        ("layers.10.fc2", 4, 32),
        ("layers.10.fc1", 4, 128),
        ("layers.10.q_proj", 3, 128),
    ):
        layer = config.layer(name)
        assert (layer.bits, layer.group) == (bits, group), f"{name=} {layer=}"
    turned = QuantConfig(overrides={"fc": {"bits": 4}, r"layers\.0\.": {"bits": 2}})
    assert turned.layer("layers.0.fc2").bits == 2, f"{turned.layer('layers.0.fc2')=}"


def test_skip():
    config = QuantConfig(overrides={r"layers\.0\.": {"skip": True}, r"layers\.0\.fc2": {"skip": False, "bits": 2}})
    assert config.layer("layers.0.fc1") is None
    assert config.layer("layers.0.fc2").bits == 2
    assert config.layer("layers.1.fc1").bits == 3


@pytest.mark.parametrize("table", [{"bits": 4}, {"group": 32}, {"bits": 4, "group": 32}, {}])
def test_only_skip_undoes_skip(table):
    # "a later match wins key by key": a table that does not speak of skip leaves it as it was
    config = QuantConfig(overrides={r"layers\.0\.": {"skip": True}, "fc2$": table})
    assert config.layer("layers.0.fc2") is None, f"{table=} {config.layer('layers.0.fc2')=}"
    assert config.layer("layers.1.fc2") is not None, f"{table=}"


def test_head():
    assert QuantConfig().layer("lm_head", is_head=True) is None
    assert QuantConfig(bits=2, head_bits=4).layer("lm_head", is_head=True) == LayerConfig(4, 128)
    assert QuantConfig(bits=2, head_bits=4).layer("lm_head").bits == 2
    assert QuantConfig(overrides={"lm_head": {"bits": 4}}).layer("lm_head", is_head=True) == LayerConfig(4, 128)
    assert QuantConfig(head_bits=4, overrides={"lm_head": {"skip": True}}).layer("lm_head", is_head=True) is None
    assert QuantConfig(head_bits=4, overrides={"lm_head": {"bits": 2, "group": 0}}).layer("lm_head", True) == LayerConfig(2, 0)
    assert QuantConfig(overrides={"lm_head": {"group": 32}}).layer("lm_head", is_head=True) is None


def write_recipe(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_recipe_is_read(tmp_path):
    text = (
        'bits = 2\nmethod = "greedy"\ntolerance = 0\n[overrides."fc2$"]\nbits = 4\n[overrides."layers\\\\.0\\\\."]\nskip = true\n'
    )
    path = write_recipe(tmp_path, text)
    expected = QuantConfig(2, method="greedy", tolerance=0.0, overrides={"fc2$": {"bits": 4}, r"layers\.0\.": {"skip": True}})
    for recipe in (path, str(path)):
        assert make_config(recipe) == expected, f"{recipe=} {make_config(recipe)=}"
        assert list(make_config(recipe).overrides) == ["fc2$", r"layers\.0\."], f"{recipe=}"  # their order has a meaning


@pytest.mark.parametrize("key", ["bit", "Bits", "group_size", "override"])
def test_unknown_key_is_refused(tmp_path, key):
    path = write_recipe(tmp_path, f"bits = 2\n{key} = 3\n")
    with pytest.raises(LutqError) as caught:
        make_config(path)
    message = str(caught.value)
    assert repr(key) in message, f"{key=} {message=}"
    assert str(path) in message, f"{key=} {message=}"
    assert all(name in message for name in FIELDS), f"{key=} {message=}"


@pytest.mark.parametrize("text", ["bits 3", "bits = ", "[overrides", "bits = 2\nbits = 3", b"method = '\xff\xfe'"])
def test_bad_toml_is_refused(tmp_path, text):
    path = write_recipe(tmp_path, text)
    with pytest.raises(LutqError, match=re.escape(f"recipe {path} is not valid TOML")):
        make_config(path)


@pytest.mark.parametrize(("text", "field"), [("bits = 7", "bits"), ("bits = '3'", "bits"), ("overrides = 3", "overrides")])
def test_bad_value_in_a_recipe_is_refused(tmp_path, text, field):
    with pytest.raises(LutqError, match=rf"^{field}"):
        make_config(write_recipe(tmp_path, text))


@pytest.mark.parametrize("recipe", ["nothing", "nothing.toml", "configs/nothing", "/no/such/folder/nothing.toml", ""])
def test_missing_recipe_lists_what_is_shipped(recipe):
    with pytest.raises(LutqError) as caught:
        make_config(recipe)
    message = str(caught.value)
    assert repr(recipe) in message, f"{recipe=} {message=}"
    assert all(path.stem in message for path in RECIPES), f"{recipe=} {message=}"


@pytest.mark.parametrize("recipe", ["/no/such/folder/rtn-4bit.toml", "mine/rtn-4bit.toml", "../rtn-4bit", "rtn-4bit.json"])
def test_missing_path_is_not_taken_for_a_shipped_name(recipe):
    with pytest.raises(LutqError, match="no recipe"):
        pytest.fail(f"{recipe=} was read as {read_recipe(recipe)}")


def test_folder_is_no_recipe(tmp_path):
    with pytest.raises(LutqError, match="no recipe"):
        make_config(tmp_path)


def test_flags_override_the_recipe(tmp_path):
    path = write_recipe(tmp_path, "bits = 2\ngroup = 64\nclip = true\niterations = 3\n")
    config = make_config(path, bits=4, group=None, clip=False, iterations=0, method="greedy")
    assert config == QuantConfig(bits=4, group=64, clip=False, iterations=0, method="greedy"), f"{config=}"
    assert make_config(None, bits=1, group=0) == QuantConfig(bits=1, group=0)
    assert make_config() == QuantConfig()


def test_flags_are_checked_like_a_recipe():
    with pytest.raises(LutqError, match=r"^bits"):
        make_config("default", bits=9)
    with pytest.raises(TypeError):
        make_config("default", bit=3)


@pytest.mark.parametrize("recipe", ["default", "default.toml", "configs/default.toml", "configs/default"])
def test_default_recipe_is_the_default(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # found by name, wherever the command is run
    assert make_config(recipe) == QuantConfig(), f"{recipe=} {make_config(recipe)=}"
    assert set(read_recipe(recipe)) == set(FIELDS) - {"overrides"}, f"{recipe=} {read_recipe(recipe)=}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    assert make_config(path.stem) == make_config(path) == QuantConfig(**tomllib.loads(path.read_text())), f"{path=}"


def test_three_recipes_are_shipped():
    assert {"default", "mixed-3bit", "rtn-4bit"} <= {path.stem for path in RECIPES}, f"{RECIPES=}"


TABLES = st.fixed_dictionaries(
    {}, optional={"bits": st.integers(1, 4), "group": st.sampled_from([0, 32, 128]), "skip": st.booleans()}
)
CONFIGS = st.builds(
    QuantConfig,
    bits=st.integers(1, 4),
    group=st.integers(0, 100).map(lambda words: 32 * words),
    method=st.sampled_from(METHODS),
    offsets=st.booleans(),
    symmetric=st.booleans(),
    clip=st.booleans(),
    start=st.sampled_from(STARTS),
    iterations=st.integers(0, 10**6),
    tolerance=st.floats(0, 1, exclude_max=True),
    calib=st.text(),
    calib_windows=st.integers(1, 10**6),
    calib_length=st.integers(2, 10**6),
    flips=st.booleans(),
    rate=st.floats(0, 1, exclude_max=True),
    head_bits=st.sampled_from([1, 2, 3, 4, KEEP_BITS]),
    overrides=st.dictionaries(st.text().map(re.escape), TABLES, max_size=3),
)


@settings(deadline=None)
@given(config=CONFIGS)
def test_json_round_trip(config):
    back = QuantConfig(**json.loads(json.dumps(config.to_dict())))
    assert back == config, f"{config=} {back=}"
    assert list(back.overrides) == list(config.overrides), f"{config=} {back=}"
    config.to_dict()["overrides"]["new"] = {}
    assert "new" not in config.overrides, f"to_dict hands out what the settings own: {config=}"
