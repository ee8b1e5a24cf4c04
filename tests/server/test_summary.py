"""What the server says when it is ready, and while it loads: on a terminal and in a log."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

import msgspec
import pytest

from server.engine.messages import CLASSIFICATION, NO, YES, EngineInfo
from server.summary import format_count, loading_shown, show_summary, summary_rows
from tests.server.conftest import make_settings
from tests.server.fake_engine import fake_info

URL = "http://127.0.0.1:8000"


@pytest.fixture
def info() -> EngineInfo:
    return fake_info(max_model_len=256, vocab_size=257)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """A terminal in place of stderr. pytest puts its own there after the fixtures, so that this is none."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.redirect_stderr(Terminal()) as stream:
        yield stream


def test_it_tells_what_is_served_and_what_fits(info: EngineInfo) -> None:
    rows = dict(summary_rows(info, make_settings(), URL))
    assert rows["model"] == "tiny: 1.23K parameters, run run-1, step 5000"
    assert rows["weights"] == "float32"
    assert rows["device"] == "a test's CPU (cpu), attention by torch"
    # 100 blocks of 16 tokens hold six whole contexts of 256.
    assert rows["KV cache"] == "100 blocks of 16: 1,600 tokens, 6 contexts of 256"
    assert rows["at once"] == "8 sequences, 512 tokens in a step"
    assert rows["page"] == f"{URL}/"
    cpu = msgspec.structs.replace(info, device_name="cpu (2 threads)")
    assert dict(summary_rows(cpu, make_settings(), URL))["device"] == "cpu (2 threads), attention by torch"
    assert f"{URL}/docs" in rows["API"]


@pytest.mark.parametrize(
    ("answer", "begins"), [(YES, "yes"), (NO, "no"), ("unchecked", "checked in the first idle moment")]
)
def test_it_tells_whether_tokens_depend_on_the_load(info: EngineInfo, answer: str, begins: str) -> None:
    info = msgspec.structs.replace(info, deterministic=answer)
    assert dict(summary_rows(info, make_settings(), URL))["deterministic"].startswith(begins)


def test_every_model_has_a_row_and_quantised_weights_are_called_so(info: EngineInfo) -> None:
    other = msgspec.structs.replace(info.models[0], name="other", num_parameters=124_439_808, provenance={})
    info = msgspec.structs.replace(info, models=[*info.models, other], dtype="bfloat16")
    rows = summary_rows(info, make_settings(quantization="int8"), URL)
    assert ("", "other: 124M parameters") in rows
    assert ("weights", "int8, computed in bfloat16") in rows


def test_a_classifier_has_no_cache(info: EngineInfo) -> None:
    model = msgspec.structs.replace(info.models[0], task=CLASSIFICATION, labels=["ham", "spam"])
    rows = dict(summary_rows(msgspec.structs.replace(info, models=[model]), make_settings(), URL))
    assert "KV cache" not in rows
    assert rows["page"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(7, "7"), (999, "999"), (1_000, "1K"), (124_439_808, "124M"), (999_700_000, "1000M"), (1_557_611_200, "1.56B")],
)
def test_counts_have_three_digits(number: int, text: str) -> None:
    assert format_count(number) == text


def test_a_log_gets_one_line(info: EngineInfo, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "server"), loading_shown(["tiny"]):
        show_summary(info, make_settings(), URL)
    [record] = caplog.records
    assert "\n" not in record.getMessage()
    assert all(value in record.getMessage() for _, value in summary_rows(info, make_settings(), URL))


def test_a_terminal_gets_a_table(
    info: EngineInfo, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with terminal(monkeypatch) as stream:
        show_summary(info, make_settings(), URL)
    assert len(stream.getvalue().splitlines()) == len(summary_rows(info, make_settings(), URL))
    assert "6 contexts of 256" in stream.getvalue()
    assert not caplog.records


def test_a_name_is_shown_as_it_is(info: EngineInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    info = msgspec.structs.replace(info, models=[msgspec.structs.replace(info.models[0], name="[bold]x[/]")])
    with terminal(monkeypatch) as stream:
        show_summary(info, make_settings(), URL)
    assert "[bold]x[/]" in stream.getvalue()


def test_a_terminal_shows_that_models_are_being_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as stream, loading_shown(["a", "[b]"]):
        pass
    assert "loading a, [b]" in stream.getvalue()
