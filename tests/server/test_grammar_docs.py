"""docs/structured-output.md is a program: its Python runs against a real server and prints what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.errors import InvalidSamplingParamsError
from model.grammar import Grammar
from server.engine.grammar_compiler import GrammarError
from server.llm import LLM, GenerationParams
from tests.docs_pages import run_python
from tests.server.real import running, save_random

PAGE = Path(__file__).parents[2] / "docs" / "structured-output.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("structured") / "mine")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    return folder


def test_the_page(folder: Path, tmp_path: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count("http://127.0.0.1:8000") >= 2
    page = tmp_path / PAGE.name
    with running(folder, "--served-model-name", "mine", "--num-threads", "1") as server:
        server.wait_ready()
        text = text.replace("http://127.0.0.1:8000", server.url).replace('LLM("path/to/folder")', f'LLM("{folder}")')
        page.write_text(text, encoding="utf-8")
        results = list(run_python(page))
    assert len(results) == 4
    assert [(each.line, each.actual) for each in results] == [(each.line, each.stated or "") for each in results]


def test_llm_refuses_a_wrong_grammar_before_anything_runs(folder: Path) -> None:
    with LLM(folder, dtype="float32", num_threads=1) as llm:
        with pytest.raises(GrammarError, match="regular expression"):
            llm.generate(["a", "b"], [GenerationParams(), GenerationParams(grammar=Grammar.regex("("))])
        with pytest.raises(InvalidSamplingParamsError, match="min_tokens"):
            GenerationParams(grammar=Grammar.regex("a+"), min_tokens=3)
        output = llm.generate("a", GenerationParams(grammar=Grammar.choice(["left", "right"]), n=2, seed=4))[0]
        assert {choice.text for choice in output.choices} <= {"left", "right"}
        assert {choice.finish_reason for choice in output.choices} == {"stop"}
