"""benchmarks/speculation.py: what it prints of a tiny model, and that it tells when texts differ."""

import json

import pytest
import speculation

from kvrun.session import Session


@pytest.fixture(scope="module")
def model(converted):
    return str(converted("grouped-tied"))


def test_a_measurement(model, converted, tmp_path, capsys):
    draft, out = str(converted("grouped-tied", "q8_0")), tmp_path / "figures.json"
    arguments = [model, "--draft", draft, "--tokens", "30", "--runs", "2", "--json", str(out)]
    assert speculation.main(arguments) == 0
    rows = json.loads(out.read_text())
    assert [(row["task"], row["spec"]) for row in rows] == [
        (task, spec)
        for task in ("copy a letter", "copy a program", "prose")
        for spec in ("no drafts", "ngram", "draft model")
    ]
    assert all(row["same_text"] and row["tokens_per_second"] > 0 for row in rows)
    assert [row["ratio"] for row in rows[::3]] == [1, 1, 1] and rows[0]["drafted_tokens"] == 0
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)


def test_a_prompt_of_ones_own(model, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("The cat " * 20)
    assert speculation.main([model, "--prompt", str(tmp_path / "prompt.txt"), "--tokens", "20", "--runs", "1"]) == 0
    assert "| prompt | ngram |" in capsys.readouterr().out
    assert speculation.main([model, "--prompt", str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_texts_that_differ(model, capsys, monkeypatch):
    assert speculation.main([model, "--check", "6", "--tokens", "30"]) == 0
    assert capsys.readouterr().out.startswith("6 prompts: 6 of 6 answers are the same; ")
    stream = Session.stream

    def other(self, prompt, **options):
        return stream(self, prompt, **{**options, "seed": 5, "temperature": 9.0} if "spec" in options else options)

    monkeypatch.setattr(Session, "stream", other)
    assert speculation.main([model, "--check", "6", "--tokens", "30"]) == 1
    assert "prompt 0, ngram: another text" in capsys.readouterr().out
    assert speculation.main([model, "--tokens", "30", "--runs", "1"]) == 1
