"""Every knob can be set in three places; typos and unusable values are errors that say what is possible."""

import os
import re
import subprocess
import sys

import pytest

from cce_inductor import config
from cce_inductor.filters import Filter

OTHER = {  # for every knob: a value that is not the default, how the environment spells it, unusable values
    "compiler": ("aot_eager", "aot_eager", ["nvcc", "", None, 1]),
    "grad_filter": (
        "budget 0.125",
        "0.125",
        ["eps", "1", "0.1 sorted", "eps 0.1 unsorted", "unbiased", "exact 0.1", 0, 1.5, True, None, (), ("eps",)],
    ),
    "min_vocab": (17, "17", [-1, "many", 1.5, None]),
    "defer_logits": (False, "off", ["maybe", "", 2, None]),
    "defer_without_loss": (False, "off", ["maybe", "", 2, None]),
    "defer_timeout": (5, "5", [0, "soon", 0.5, None]),
    "eager_heads": (True, "on", ["maybe", "", 2, None]),
    "workspace_mb": (128, "128", [0, -64, "64MB", 0.5, "", "Auto"]),
    "gradients_in_forward": (False, "no", ["maybe", "", 2, None]),
    "sharded_head": ("stream", "stream", ["ring", "", True, None]),
    "diagnostics": (True, "yes", ["maybe", "", 2, None]),
    "dump_dir": ("/tmp/dumps", "/tmp/dumps", []),
    "strict": (True, "1", ["maybe", "", 2, None]),
}


@pytest.fixture(autouse=True)
def restore():
    with config.patch():
        yield


def test_every_knob_is_covered():
    assert list(OTHER) == list(config.KNOBS) == list(config.Settings.__dataclass_fields__)
    assert all(knob.doc for knob in config.KNOBS.values())


@pytest.mark.parametrize("name", OTHER)
def test_assignment(name):
    value = OTHER[name][0]
    setattr(config, name, value)
    assert getattr(config, name) == value == getattr(config.current(), name)


@pytest.mark.parametrize("name", OTHER)
def test_patch(name):
    value, before = OTHER[name][0], getattr(config, name)
    with config.patch(**{name: value}):
        assert getattr(config.current(), name) == value
    assert getattr(config, name) == before
    with pytest.raises(KeyError), config.patch(**{name: value}):
        raise KeyError
    assert getattr(config, name) == before


def test_a_patch_with_a_mistake_changes_nothing():
    with pytest.raises(ValueError), config.patch(min_vocab=5, workspace_mb=-1):
        pass
    assert config.current() == config.Settings(**config.from_environment(os.environ))


@pytest.mark.parametrize("name", OTHER)
def test_options(name):
    value = OTHER[name][0]
    options = {name: value, "max_autotune": True}
    settings, rest = config.split_options(options)
    assert getattr(settings, name) == value and rest == {"max_autotune": True}
    assert options == {name: value, "max_autotune": True}, "the caller's dictionary is left alone"
    assert config.split_options(None) == (config.current(), {})


def test_options_win_over_assignment():
    config.min_vocab = 5
    settings, _ = config.split_options({"min_vocab": 6})
    assert settings.min_vocab == 6 and config.min_vocab == 5
    assert config.split_options({})[0].min_vocab == 5


@pytest.mark.parametrize("name", OTHER)
def test_environment(name):
    value, text, _ = OTHER[name]
    environ = {f"CCE_INDUCTOR_{name.upper()}": text, "PATH": "x", "CCE_INDUCTOR": "1"}
    assert config.from_environment(environ) == {name: value}


@pytest.mark.parametrize("text,value", [("1", True), ("0", False), ("True", True), ("no", False), (" ON ", True)])
def test_spellings_of_booleans(text, value):
    assert config.from_environment({"CCE_INDUCTOR_STRICT": text}) == {"strict": value}


FILTERS = {  # canonical text -> its spellings
    "exact": ["exact", " exact ", ("exact",), Filter()],
    "budget 0.002": [0.002, "0.002", "2e-3", "budget 0.002", ("budget", 0.002)],
    "unbiased 0.001953125": [("unbiased", 2**-9), ["unbiased", 2**-9], "unbiased 0.001953125"],
    "eps 0.0002": [("eps", 2e-4), ("eps", "0.0002"), "eps 0.0002", "eps  2e-4"],
    "eps 0.0002 sorted": [("eps", 2e-4, "sorted"), ["eps", 2e-4, "sorted"], "eps 0.0002 sorted"],
}


@pytest.mark.parametrize("text,value", [(text, value) for text in FILTERS for value in FILTERS[text]])
def test_spellings_of_filters(text, value):
    """Whatever is set is read back as one text, which can be set again."""
    config.grad_filter = value
    assert config.grad_filter == config.current().grad_filter == text
    config.grad_filter = config.grad_filter
    assert str(Filter.read(config.grad_filter)) == text
    if isinstance(value, str):
        assert config.from_environment({"CCE_INDUCTOR_GRAD_FILTER": value}) == {"grad_filter": text}


def test_an_unusable_filter_says_what_is_usable():
    with pytest.raises(ValueError) as raised:
        config.grad_filter = ("eps", 2)
    for usable in ("'exact'", "'0.002'", "('unbiased', <budget>)", "'eps 0.0002 sorted'"):
        assert usable in str(raised.value)


def test_the_settings_need_no_torch():
    code = "import sys, cce_inductor.config as c; c.grad_filter = 0.5; sys.exit('torch' in sys.modules)"
    assert run(code).returncode == 0


def run(code: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": os.pathsep.join(sys.path), **environ},
        capture_output=True,
        text=True,
    )


def test_environment_of_a_process():
    code = "from cce_inductor import config; print(config.min_vocab, config.strict, config.dump_dir, config.compiler)"
    result = run(code, CCE_INDUCTOR_MIN_VOCAB="7", CCE_INDUCTOR_STRICT="yes", CCE_INDUCTOR_DUMP_DIR="")
    assert result.stdout.split() == ["7", "True", "None", "inductor"], result.stderr


def test_a_typo_in_the_environment_is_an_error():
    result = run("from cce_inductor import config", CCE_INDUCTOR_MINVOCAB="7")
    assert result.returncode != 0
    assert "has no option 'minvocab' (environment variable CCE_INDUCTOR_MINVOCAB)" in result.stderr


@pytest.mark.parametrize("name,value", [(name, bad) for name in OTHER for bad in OTHER[name][2]])
def test_unusable_values(name, value):
    before = getattr(config, name)
    message = re.escape(f"cce_inductor option {name}={value!r}") + r" \(.*\) must be"
    with pytest.raises(ValueError, match=message):
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message), config.patch(**{name: value}):
        pass
    with pytest.raises(ValueError, match=message):
        config.split_options({name: value})
    if isinstance(value, str):
        with pytest.raises(ValueError, match=message):
            config.from_environment({f"CCE_INDUCTOR_{name.upper()}": value})
    assert getattr(config, name) == before


def test_unknown_names():
    everything = "it has compiler, grad_filter, min_vocab"
    with pytest.raises(ValueError, match=f"no option 'min_vocabulary' .*{everything}"):
        config.min_vocabulary = 5
    with pytest.raises(AttributeError, match=f"no knob 'min_vocabulary'; {everything}"):
        _ = config.min_vocabulary
    with pytest.raises(ValueError, match=everything), config.patch(min_vocabulary=5):
        pass
    # An option that is not ours is Inductor's, which complains about those it does not know.
    assert config.split_options({"min_vocabulary": 5})[1] == {"min_vocabulary": 5}


def test_through_the_package():
    import cce_inductor

    cce_inductor.config.workspace_mb = 3
    assert config.current().workspace_mb == 3


def test_scratch_may_be_left_to_the_device_or_to_the_logits():
    assert config.Settings().workspace_mb is None
    for value in ("auto", None, 5):
        config.workspace_mb = value
        assert config.workspace_mb == value
    assert config.from_environment({"CCE_INDUCTOR_WORKSPACE_MB": "auto"}) == {"workspace_mb": "auto"}
    with pytest.raises(ValueError, match=r"workspace_mb='much'.* must be an integer, or 'auto', or None"):
        config.workspace_mb = "much"
