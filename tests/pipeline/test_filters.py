import dataclasses
import json
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decode.records import MediaInfo
from pipeline.errors import UsageError
from pipeline.filters import NAMES, Facts, FilterConfig, compile_keep, reject_reason

VIDEO = MediaInfo("video", "mp4", "h264", 1280, 720, 0, 25.0, 250, 10.0, "yuv420p", 1)
IMAGE = MediaInfo("image", "jpeg", "mjpeg", 1280, 720, 0, 0.0, 1, 0.0, "yuv420p", 1)
META = {"aesthetic": 5.5, "tags": ["cat", "dog"], "nested": {"deep": [1, {"x": 2}]}, "none": None, "big": 10**30}
FACTS = Facts(VIDEO, key="a/0001", caption="A black cat", metadata=json.dumps(META))


def keep_reason(keep: str, facts: Facts = FACTS) -> str | None:
    return reject_reason(FilterConfig(keep=keep), facts)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"min_width": 1280, "min_height": 720}, None),
        ({"min_width": 1281}, "min_width"),
        ({"min_height": 721}, "min_height"),
        ({"min_fps": 25.0, "max_fps": 25.0}, None),
        ({"min_fps": 25.1}, "min_fps"),
        ({"max_fps": 24.9}, "max_fps"),
        ({"min_duration_seconds": 10.0, "max_duration_seconds": 10.0}, None),
        ({"min_duration_seconds": 10.1}, "min_duration_seconds"),
        ({"max_duration_seconds": 9.9}, "max_duration_seconds"),
        ({"min_width": 2000, "min_fps": 60.0, "keep": "False"}, "min_width"),
        ({"max_fps": 10.0, "min_duration_seconds": 60.0}, "max_fps"),
        ({"min_fps": 60.0, "keep": "False"}, "min_fps"),
    ],
)
def test_bounds_are_inclusive_and_the_first_broken_one_is_the_reason(options, expected):
    assert reject_reason(FilterConfig(**options), FACTS) == expected


def test_a_rate_that_is_not_a_number_is_out_of_bounds():
    facts = dataclasses.replace(FACTS, info=dataclasses.replace(VIDEO, fps=float("nan")))
    assert reject_reason(FilterConfig(min_fps=1.0), facts) == "min_fps"
    assert reject_reason(FilterConfig(max_fps=60.0), facts) == "max_fps"


def test_bounds_in_time_do_not_bind_images():
    image = Facts(IMAGE, key="b")
    assert reject_reason(FilterConfig(min_fps=10.0, min_duration_seconds=1.0), image) is None
    assert reject_reason(FilterConfig(min_width=1281), image) == "min_width"
    assert keep_reason('kind == "video"', image) == "keep"


@pytest.mark.parametrize(
    "keep",
    [
        'width >= 720 and meta["aesthetic"] > 5 and "cat" in caption',
        "600 < height <= 720 < width",
        'codec in ("h264", "hevc") and container not in ["mov"]',
        'not (codec == "av1" or rotation_degrees != 0)',
        '"cat" in meta["tags"] and meta["tags"][-1] == "dog"',
        'meta["nested"]["deep"][1]["x"] == 2',
        '"missing" not in meta or meta["missing"] > 3',
        '(meta["none"] or 7) == 7',
        'meta["aesthetic"] > 9 if kind == "image" else num_frames == 250',
        'len(caption) == 11 and min(width, height) == 720 and max(meta["tags"]) == "dog"',
        'lower(caption) == "a black cat"',
        "abs(width / height - 16 / 9) < 0.01 and abs(-3) == 3",
        "duration_seconds * fps == num_frames and 7 // 2 + 7 % 2 - 1 == 3",
        'meta["tags"] == ("cat", "dog")',
        'meta["big"] > width',
        'key == "a/0001" and True and None == None',
        "(width > 1 and\n height > 1)  ",
    ],
)
def test_expressions_that_hold(keep):
    assert keep_reason(keep) is None
    assert keep_reason(f"not ({keep})") == "keep"


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        ('meta["missing"] > 5', "keep_missing_field"),
        ('meta["tags"][2] == "cat"', "keep_missing_field"),
        ('meta["aesthetic"]["x"] > 5', "keep_type_error"),
        ('meta["none"] > 5', "keep_type_error"),
        ("caption > 5", "keep_type_error"),
        ("caption * 1000000000", "keep_type_error"),
        ('"%1000000000d" % width', "keep_type_error"),
        ("[1] * 1000000000", "keep_type_error"),
        ('meta["big"] * 2 > 0', "keep_type_error"),
        ("width / (height - 720) > 1", "keep_type_error"),
        ("min([]) > 1", "keep_type_error"),
        ("lower(width)", "keep_type_error"),
        ("len(width)", "keep_type_error"),
        ("meta[meta]", "keep_type_error"),
        ("3 in width", "keep_type_error"),
        ("width > 1 > 2 > caption", "keep"),
        ("caption and 0", "keep"),
    ],
)
def test_a_sample_that_does_not_fit_the_expression_is_filtered(keep, reason):
    assert keep_reason(keep) == reason


@pytest.mark.parametrize("metadata", ["{", "[1]", "3", "[" * 100_000, "9" * 5_000])
def test_metadata_that_is_no_object_is_a_reason_only_where_it_is_asked_for(metadata):
    facts = dataclasses.replace(FACTS, metadata=metadata)
    assert keep_reason('"x" in meta', facts) == "keep_bad_metadata"
    assert keep_reason("width > 1", facts) is None


def test_a_sample_without_metadata_has_no_fields():
    facts = Facts(VIDEO, key="c")
    assert keep_reason('meta["x"] > 1', facts) == "keep_missing_field"
    assert keep_reason('meta == meta and len(meta) == 0 and caption == ""', facts) is None


@pytest.mark.parametrize(
    ("keep", "problem"),
    [
        ("", "invalid syntax"),
        ("width >", "invalid syntax, at character 8 of line 1"),
        ("width > 1\nand height > 1", "of line 2"),
        ("wdith > 720", "no name 'wdith', at character 1 of line 1"),
        ('"é" in caption and x', "no name 'x', at character 20 of line 1"),
        ("(width > 1 and\n  x)", "no name 'x', at character 3 of line 2"),
        ("__import__('os')", "no such function"),
        ("caption.upper() == 'A'", "no such function"),
        ("caption.__class__", "Attribute"),
        ("(lambda: 1)()", "no such function"),
        ("[x for x in meta]", "ListComp"),
        ("f'{caption}'", "JoinedStr"),
        ("(x := 3)", "NamedExpr"),
        ("9 ** 9 ** 9", "Pow"),
        ("1 << 99999", "LShift"),
        ("~width", "Invert"),
        ("caption is None", "Is is not"),
        ("{1: 2}", "Dict"),
        ("b'x' == caption", "is not text"),
        ("2j == width", "is not text"),
        ("... == width", "is not text"),
        ("caption[0] == 'A'", "only meta"),
        ("meta['a'][1:2]", "Slice"),
        ("max(*meta)", "Starred"),
        ("len()", "takes one value"),
        ("len(caption, key)", "takes one value"),
        ("max(key=caption)", "takes values"),
        ("len(caption=caption)", "takes one value"),
        ("width > 1\0", "null bytes"),
        ("caption == '\ud800'", "cannot be parsed"),
        ("-" * 900 + "1", "nested more than"),
        ("+".join(["1"] * 400), "nested more than"),
        ("(" * 300 + "1" + ")" * 300, "too many nested"),
        ("width > " + "1" * 1000, "at most 1000"),
    ],
)
def test_what_is_not_of_the_language_is_refused_when_the_config_is_made(keep, problem):
    with pytest.raises(UsageError) as caught:
        FilterConfig(keep=keep)
    assert problem in str(caught.value)


def test_a_doubtful_escape_is_refused_whatever_the_warning_filters_say():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UsageError, match="invalid escape"):
            FilterConfig(keep='caption == "\\d"')


def test_the_message_names_the_expression_and_the_names_there_are():
    with pytest.raises(UsageError) as caught:
        FilterConfig(keep="heigth > 1")
    message = str(caught.value)
    assert "heigth > 1" in message
    assert all(name in message for name in NAMES)
    assert "lower" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_width": 0}, "min_width must be positive"),
        ({"max_fps": float("inf")}, "max_fps must be positive"),
        ({"min_fps": 30.0, "max_fps": 24.0}, "min_fps 30.0 is above max_fps 24.0"),
        ({"min_duration_seconds": 9.0, "max_duration_seconds": 3.0}, "no video would be left"),
    ],
)
def test_bounds_that_cannot_be_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        FilterConfig(**options)


def test_an_expression_is_compiled_once():
    assert compile_keep("width > 123") is compile_keep("width > 123")


def test_the_dearest_expression_is_cheap():
    factors = "*".join(["9" * 18] * 40)
    started = time.perf_counter()
    assert keep_reason(f"{factors} > 0") == "keep_type_error"
    assert keep_reason("max(" * 55 + "width, 1" + ", 1)" * 55 + " > 0") is None
    assert time.perf_counter() - started < 0.5


TOKENS = [
    *NAMES,
    *("and", "or", "not", "in", "is", "if", "else", "lambda", "for", "await", "None", "True", "__class__", "x"),
    *(
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        ".",
        "**",
        "*",
        "/",
        "//",
        "%",
        "+",
        "-",
        "~",
        "<",
        "<<",
        "==",
        "!=",
        ":=",
    ),
    *(
        "len(",
        "min(",
        "abs(",
        "lower(",
        'meta["tags"]',
        '"a"',
        "'",
        "f'",
        "b''",
        "\\",
        "\n",
        "\r",
        "\f",
        "\t",
        "#",
        "é",
    ),
    *("0", "1", "0.5", "1e999", "9" * 30, "1j", "...", "0x", "1if"),
]


@settings(deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(st.sampled_from(TOKENS), max_size=12).map(" ".join)))
def test_any_text_is_an_expression_or_a_usage_error_and_no_sample_crashes_it(text):
    try:
        config = FilterConfig(keep=text)
    except UsageError:
        return
    assert reject_reason(config, FACTS) in (None, "keep", "keep_missing_field", "keep_type_error")


LEAVES = st.sampled_from(
    ["width", "caption", "meta", 'meta["tags"]', 'meta["none"]', 'meta["big"]', 'meta["no"]', "0", "-0.5", '"a"', "[]"]
)
EXPRESSIONS = st.recursive(
    LEAVES,
    lambda part: st.one_of(
        st.builds(
            "({} {} {})".format,
            part,
            st.sampled_from(["+", "-", "*", "/", "//", "%", "<", "<=", "==", "!=", "in", "and", "or"]),
            part,
        ),
        st.builds("({} if {} else {})".format, part, part, part),
        st.builds("({}({}))".format, st.sampled_from(["len", "min", "max", "abs", "lower", "not ", "-"]), part),
        st.builds("meta[{}]".format, part),
        st.builds("[{}, {}]".format, part, part),
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(EXPRESSIONS)
def test_well_formed_expressions_compile_and_never_crash(text):
    reason = reject_reason(FilterConfig(keep=text), FACTS)
    assert reason in (None, "keep", "keep_missing_field", "keep_type_error")
