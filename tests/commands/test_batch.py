"""The command `kvrun batch`: every line gets the answer that it would have alone, or its error."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

import kvrun
from kvrun.commands import batch_files
from kvrun.commands import main as cli
from support.commands import KVRUN, Terminal, command, refused

STEADY = ["-n", "12", "--seed", "3", "--ignore-eos"]
WAIT = 60


class Folder:
    """Where prompts and answers are."""

    def __init__(self, folder):
        self.prompts, self.answers = str(folder / "in.jsonl"), str(folder / "out.jsonl")

    def write(self, *lines):
        with open(self.prompts, "wb") as file:
            for line in lines:
                file.write((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")

    def records(self):
        with open(self.answers, "rb") as file:
            data = file.read()
        assert not data or data.endswith(b"\n")
        return [json.loads(line) for line in data.splitlines()]

    def run(self, capsys, model, *arguments):
        """(exit status, records, standard error)"""
        status = cli.main(["batch", model, self.prompts, "-o", self.answers, *arguments])
        captured = capsys.readouterr()
        assert not captured.out
        return status, self.records(), captured.err


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def texts(records):
    return {record.get("custom_id", record.get("line")): record["text"] for record in records}


def messages_of(records):
    return {record.get("custom_id", record.get("line")): record["error"]["message"] for record in records}


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", ["1", "4"])
def test_answers_are_those_of_the_command_alone(model, folder, parallel, capsys):
    prompts = ["The cat", "word " * 200, "Straße 🚀", "a\n", "  b", "Why?"]
    options = [*STEADY, "--temperature", "1.2", "--kv", "q4", "--ctx", "200"]
    expected = {}
    for number, prompt in enumerate(prompts, 1):
        assert cli.main([model, "-q", "-p", prompt, *options]) == 0
        expected[number] = capsys.readouterr().out.removesuffix("\n")
    folder.write(*({"prompt": prompt} for prompt in prompts))
    status, records, _err = folder.run(capsys, model, "--parallel", parallel, *options)
    assert status == 0
    assert {number: text.removesuffix("\n") for number, text in texts(records).items()} == expected


def test_a_line_has_options_of_its_own(model, folder, capsys):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    lines = {
        "a": ({"prompt": "The cat"}, {"max_tokens": 5, "seed": 9}),
        "b": ({"messages": messages}, {"temperature": 0, "top_k": None}),
        "c": ({"prompt": "The cat"}, {"raw": True, "stop": ["e", "x"]}),
        "d": ({"prompt": [5, 6, 7]}, {"ignore_eos": False}),
    }
    folder.write(*({"custom_id": name, **asked, **options} for name, (asked, options) in lines.items()))
    status, records, _err = folder.run(capsys, model, *STEADY)
    loaded, usual = kvrun.load(model), {"max_tokens": 12, "seed": 3, "ignore_eos": True}
    assert status == 0
    assert texts(records) == {
        name: loaded.generate(asked.get("prompt", messages), **{**usual, **options})
        for name, (asked, options) in lines.items()
    }


@pytest.mark.parametrize("parallel", ["1", "4"])
def test_drafts(model, converted, folder, parallel, capsys):
    """The same answers; by the command's options, or by those of a line."""
    prompts = [{"prompt": prompt} for prompt in ("The cat", "word " * 50, "a", "Why?")]
    options = ["-n", "90", "--temperature", "0", "--ignore-eos", "--parallel", parallel]
    folder.write(*prompts)
    expected = texts(folder.run(capsys, model, *options)[1])
    for spec, more in (
        (["--spec", "ngram"], {}),
        (["--spec", str(converted("grouped-tied", "q8_0"))], {}),
        ([], {"spec": "ngram"}),
        (["--spec", "ngram"], {"spec": "none"}),
    ):
        os.remove(folder.answers)
        folder.write(*({**prompt, **more} for prompt in prompts))
        status, records, err = folder.run(capsys, model, *options, *spec)
        assert status == 0 and texts(records) == expected
        said = re.search(r"; (\d+) of (\d+) drafted tokens accepted\]\n$", err)
        if parallel == "1" and "ngram" in (*spec, *more.values()):
            assert bool(said) == (more != {"spec": "none"})


def test_draft_models_that_cannot_be(model, plain, folder):
    folder.write({"prompt": "a"})
    refused(command("batch", model, folder.prompts, "-o", folder.answers, "--spec", plain), "spec: ", "other tokens")
    assert not os.path.exists(folder.answers)


def test_a_record(model, folder, capsys):
    session = kvrun.load(model).session()
    text = "".join(session.stream("The cat", max_tokens=12, seed=3, ignore_eos=True))
    n, stop = session.stats.prompt_tokens, text[len(text) // 2]
    folder.write({"prompt": "The cat"}, b"", {"custom_id": 7, "prompt": "The cat", "stop": stop})
    status, records, err = folder.run(capsys, model, "--in-order", *STEADY)
    assert status == 0
    assert records[0] == {
        "line": 1,
        "text": text,
        "finish_reason": "length",
        "usage": {"prompt_tokens": n, "completion_tokens": 12, "total_tokens": n + 12},
    }
    assert list(records[1]) == ["custom_id", "text", "finish_reason", "usage"]
    assert records[1]["custom_id"] == 7 and records[1]["finish_reason"] == "stop"
    assert records[1]["text"] == text[: text.index(stop)]
    tokens = 12 + records[1]["usage"]["completion_tokens"]
    prompts = rf"prompts {2 * n} tokens, {n - 1} of them read before"
    assert re.fullmatch(rf"\[2 answers, 0 errors; {prompts}; answers {tokens} tokens, [\d.]+ tok/s\]\n", err)


def test_the_order(model, folder, capsys):
    folder.write({"prompt": "a", "max_tokens": 400}, b"{", *({"prompt": "b", "max_tokens": 2} for _ in range(8)))
    assert folder.run(capsys, model, "--ignore-eos", "--parallel", "2")[1][-1]["line"] == 1
    os.remove(folder.answers)
    records = folder.run(capsys, model, "--ignore-eos", "--parallel", "2", "--in-order")[1]
    assert [record["line"] for record in records] == list(range(1, 11))


def test_a_model_without_a_template(plain, folder, capsys):
    folder.write({"prompt": "The cat"}, {"messages": [{"role": "user", "content": "a"}]})
    status, records, _err = folder.run(capsys, plain, "-q", "--in-order", *STEADY)
    assert status == 1 and "no chat template" in records[1]["error"]["message"]
    assert records[0]["text"] == kvrun.load(plain).generate("The cat", max_tokens=12, seed=3, ignore_eos=True)


# --- what is wrong with a line --------------------------------------------------------------------


BAD = {
    b"{": "not JSON",
    b"[1]": "not a JSON object",
    b"5": "not a JSON object",
    b'{"prompt": "\xff"}': "not UTF-8",
    b"[" * 100_000: "not JSON",
    b'{"prompt": ' + b"1" * 5000 + b"}": "not JSON",
    b"{}": "needs a prompt or messages",
    b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}': "not both",
    b'{"prompt": ""}': "the prompt is empty",
    b'{"prompt": " "}': "the prompt is empty",
    b'{"prompt": "", "raw": true}': "the prompt is empty",
    b'{"prompt": []}': "the prompt is empty",
    b'{"prompt": 5}': "must be text",
    b'{"prompt": {"a": 1}}': "must be text",
    b'{"prompt": [1000000]}': "token id",
    b'{"prompt": ["a"]}': "token id",
    b'{"prompt": "\\ud800"}': "",
    b'{"messages": []}': "messages",
    b'{"messages": "a"}': "messages",
    b'{"messages": [5]}': "messages",
    b'{"messages": [{"role": "user"}]}': "message 1 has no content",
    b'{"messages": [{"role": "user", "content": {"a": 1}}]}': "message 1 has no content",
    b'{"messages": [{"role": "user", "content": [5]}]}': "message 1",
    b'{"prompt": "a", "temprature": 1}': "'temprature' is not an option",
    b'{"prompt": "a", "temperature": "hot"}': "temperature: must be a number",
    b'{"prompt": "a", "temperature": NaN}': "temperature: must be a finite number",
    b'{"prompt": "a", "stop": {}}': "stop",
    b'{"prompt": "a", "raw": 1}': "raw",
    b'{"prompt": "a", "max_tokens": 1.5}': "max_tokens",
    b'{"prompt": "a", "custom_id": [1]}': "custom_id",
    b'{"prompt": "a", "custom_id": true}': "custom_id",
    b'{"prompt": "a", "think": false}': "think",
    b'{"prompt": "a", "spec": "model.bin"}': "spec: a line can have ngram or none, a model only the command",
    b'{"prompt": "a", "spec": 5}': "spec",
    b'{"prompt": "a", "spec": "ngram", "spec_draft_n_max": 0}': "spec_draft_n_max",
}


def test_a_bad_line_is_an_error_of_its_own(model, folder, capsys):
    lines = [line for bad in BAD for line in (bad, b'{"prompt": "a"}')]
    folder.write(*lines)
    status, records, err = folder.run(capsys, model, "--in-order", "-n", "2", "--seed", "1")
    assert status == 1
    assert err.endswith(f"\nkvrun: {len(BAD)} of {2 * len(BAD)} lines have errors\n") and err.count("\n") == 2
    assert [record["line"] for record in records] == list(range(1, 2 * len(BAD) + 1))
    assert all("text" in record for record in records[1::2])
    for (line, word), record in zip(BAD.items(), records[::2]):
        assert list(record) == ["line", "error"] and word in record["error"]["message"], (line[:80], record)


def test_two_lines_with_one_custom_id(model, folder, capsys):
    folder.write(*({"custom_id": "a", "prompt": prompt} for prompt in "ab"), {"custom_id": "b", "prompt": "c"})
    status, records, _err = folder.run(capsys, model, "--in-order", *STEADY)
    assert status == 1 and [record["custom_id"] for record in records] == ["a", "a", "b"]
    assert records[1]["error"] == {"message": "line 2 has the custom_id of line 1"}


def test_a_prompt_that_is_longer_than_the_model_can_read(family, folder, capsys):
    folder.write({"prompt": "word " * 3000, "raw": True}, {"prompt": "a", "raw": True})
    status, records, _err = folder.run(capsys, str(family("gpt2")), "--in-order", "-n", "2", "--seed", "1")
    assert status == 1 and "positions" in records[0]["error"]["message"] and "text" in records[1]


def test_a_prompt_that_is_longer_than_the_cache(model, folder, capsys):
    folder.write({"prompt": "word " * 300})
    status, _records, err = folder.run(capsys, model, "-q", "--ctx", "140", *STEADY)
    assert status == 0 and err.startswith("kvrun: 1 prompt has more tokens than the cache keeps")


def test_a_line_without_end(model, folder, capsys, monkeypatch):
    monkeypatch.setattr(batch_files, "LONGEST_TEXT", 100_000)
    monkeypatch.setattr("kvrun.commands.batch_lines.LONGEST_TEXT", 100_000)
    folder.write(b'{"prompt": "' + b"a" * 200_000 + b'"}', {"prompt": "a"})
    status, records, _err = folder.run(capsys, model, "--in-order", *STEADY)
    assert status == 1 and "longer than" in records[0]["error"]["message"] and "text" in records[1]


# --- OpenAI's form --------------------------------------------------------------------------------

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]


def asked(name, url, **body):
    return {"custom_id": name, "method": "POST", "url": url, "body": {"model": "some", "user": "me", **body}}


def bodies(records):
    """custom_id: body of the response, of records that are as they should be."""
    found = {}
    for record in records:
        assert list(record) == ["id", "custom_id", "response", "error"] and record["error"] is None
        assert record["id"].startswith("batch_req_") and record["response"]["request_id"]
        body = record["response"]["body"]
        assert record["response"]["status_code"] == (400 if "error" in body else 200)
        found[record["custom_id"]] = body
    return found


def test_chat_completions(model, folder, capsys):
    options = {"max_tokens": 7, "seed": 5, "temperature": 1.5, "top_p": 0.5, "top_k": 7, "ignore_eos": True}
    folder.write(
        asked("a", CHAT, messages=MESSAGES, **options),
        asked(
            "b", CHAT, messages=MESSAGES, max_completion_tokens=3, **options, n=1, stream=False, tools=None, raw=True
        ),
        asked("c", CHAT, messages=MESSAGES, stop="e", response_format={"type": "text"}, presence_penalty=0),
    )
    status, records, _err = folder.run(capsys, model, *STEADY)
    found, session = bodies(records), kvrun.load(model).session()
    text = "".join(session.stream(MESSAGES, **options))
    n = session.stats.prompt_tokens
    assert status == 0
    body = found["a"]
    assert body.pop("id").startswith("chatcmpl-") and abs(body.pop("created") - time.time()) < 60
    assert body == {
        "object": "chat.completion",
        "model": "some",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {
            "prompt_tokens": n,
            "completion_tokens": 7,
            "total_tokens": n + 7,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
    loaded, usual = kvrun.load(model), {"max_tokens": 12, "seed": 3, "ignore_eos": True}
    texts = {name: body["choices"][0]["message"]["content"] for name, body in found.items()}
    assert texts["b"] == loaded.generate(MESSAGES, **{**options, "max_tokens": 3})
    assert texts["c"] == loaded.generate(MESSAGES, **usual, stop="e")


def test_text_completions(model, folder, capsys):
    prompts = {"a": "The cat", "b": ["The cat"], "c": [5, 6, 7], "d": [[5, 6, 7]], "e": " "}
    folder.write(*(asked(name, TEXT, prompt=prompt) for name, prompt in prompts.items()))
    status, records, _err = folder.run(capsys, model, *STEADY)
    loaded, usual = kvrun.load(model), {"max_tokens": 12, "seed": 3, "ignore_eos": True, "raw": True}
    plain = {"a": "The cat", "b": "The cat", "c": [5, 6, 7], "d": [5, 6, 7], "e": " "}
    found = bodies(records)
    assert status == 0
    assert {name: body["choices"][0]["text"] for name, body in found.items()} == {
        name: loaded.generate(prompt, **usual) for name, prompt in plain.items()
    }
    body = found["a"]
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
    assert list(body["choices"][0]) == ["index", "text", "logprobs", "finish_reason"]


@pytest.mark.parametrize(
    "field",
    [
        {"n": 2},
        {"stream": True},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"functions": [{}]},
        {"response_format": {"type": "json_object"}},
        {"logprobs": True},
        {"logprobs": 0},
        {"top_logprobs": 3},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -1},
        {"logit_bias": {"5": 100}},
        {"modalities": ["text", "audio"]},
        {"best_of": 3},
        {"echo": True},
        {"suffix": "b"},
        {"temperature": "hot"},
        {"spec": "model.bin"},
        {"max_tokens": "many"},
        {"messages": [], "prompt": []},
        {"messages": "a", "prompt": ["a", "b"]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "prompt": [{"role": "user"}]},
    ],
    ids=lambda field: next(iter(field)),
)
def test_what_is_asked_for_and_cannot_be_done(model, folder, capsys, field):
    body = {"messages": MESSAGES, "prompt": "a", **field}
    folder.write(asked("a", CHAT, **body), asked("b", TEXT, **body))
    status, records, err = folder.run(capsys, model, "-q", *STEADY)
    assert (status, err) == (1, "kvrun: 2 of 2 lines have errors\n")
    for body in bodies(records).values():
        assert body["error"].pop("message")
        assert body == {"error": {"type": "invalid_request_error", "param": None, "code": None}}


def test_lines_that_are_not_quite_of_that_form(model, folder, capsys):
    good = {"url": CHAT, "body": {"messages": MESSAGES}}
    folder.write(
        good,
        {**good, "method": "GET"},
        {**good, "url": "/v1/embeddings"},
        {**good, "url": [CHAT]},
        {"url": CHAT},
        {"body": {"messages": MESSAGES}},
        {"custom_id": "a", "url": CHAT, "body": 5},
        {"custom_id": [], "url": CHAT, "body": {"messages": MESSAGES}},
    )
    status, records, _err = folder.run(capsys, model, "--in-order", *STEADY)
    assert status == 1 and [record["response"]["status_code"] for record in records] == [200] + [400] * 7
    assert [(record["custom_id"], record.get("line")) for record in records] == [
        *((None, number) for number in range(1, 7)),
        ("a", None),
        (None, 8),
    ]
    assert records[0]["response"]["body"]["model"] == kvrun.load(model).description.name


# --- going on -------------------------------------------------------------------------------------


def test_going_on_where_it_was(model, folder, capsys):
    lines = [{"custom_id": "a", "prompt": "a"}, {"prompt": "b"}, {"custom_id": 3, "prompt": ""}, asked("d", CHAT)]
    folder.write(*lines)
    assert folder.run(capsys, model, *STEADY)[0] == 1
    before = folder.records()
    lines[2]["prompt"], lines[3] = "c", asked("d", CHAT, messages=MESSAGES)
    folder.write(*lines, {"custom_id": "e", "prompt": "e"}, {"custom_id": "a", "prompt": "a"})
    status, records, err = folder.run(capsys, model, *STEADY)
    assert status == 1 and "[3 answers, 1 error, 2 answered before; " in err and "1 of 6 lines" in err
    assert records[:4] == before
    assert sorted(map(str, messages_of(records[4:5]))) == ["a"]
    assert {record.get("custom_id") for record in records[5:]} == {3, "d", "e"}
    assert not any("error" in record and record["error"] for record in records[5:])
    folder.write(*lines)
    status, after, err = folder.run(capsys, model, *STEADY)
    assert status == 0 and after == records and "[0 answers, 0 errors, 4 answered before; " in err


@pytest.mark.parametrize("openai", [False, True])
def test_a_torn_record_is_made_again(model, folder, capsys, openai):
    names, alone = "abcd", ("--cache-ram", "0")  # what OpenAI's form says of prompts read before depends on the run
    folder.write(*(asked(i, TEXT, prompt=i) if openai else {"custom_id": i, "prompt": i} for i in names))
    assert folder.run(capsys, model, "--in-order", *STEADY, *alone)[0] == 0
    with open(folder.answers, "rb") as file:
        whole = file.read()
    last = whole[:-1].rindex(b"\n") + 1
    for size in (last + 1, (last + len(whole)) // 2, len(whole) - 2, len(whole) - 1):
        os.truncate(folder.answers, size)
        status, records, err = folder.run(capsys, model, *STEADY, *alone)
        assert status == 0 and [record["custom_id"] for record in records] == list(names)
        assert f"[{int(size < len(whole) - 1)} answer" in err
        with open(folder.answers, "rb") as file:
            assert file.read(last) == whole[:last]


@pytest.mark.parametrize(
    "content",
    [
        b"a text\n",
        b"a text",
        b'{"custom_id": "a", "prompt": "a"}',
        b'{"a": 1}\n',
        b'{"custom_id": [], "text": "a"}\n',
        b'{"line": 1, "text": "a"}\n\0\0\0\n{"line": 2',
        b"[" * 100_000,
        b"\xff\xfe\n",
    ],
    ids=lambda content: content[:10].decode("latin-1"),
)
def test_a_file_that_holds_something_else_is_left_alone(model, folder, capsys, content):
    folder.write({"prompt": "a"})
    with open(folder.answers, "wb") as file:
        file.write(content)
    status = cli.main(["batch", model, folder.prompts, "-o", folder.answers, *STEADY])
    refused((status, *capsys.readouterr()), "out.jsonl: line ", "is no record of kvrun batch")
    with open(folder.answers, "rb") as file:
        assert file.read() == content


def test_one_process_at_a_time(model, folder, capsys):
    folder.write({"prompt": "a"})
    other = batch_files.RecordFile(folder.answers)
    status = cli.main(["batch", model, folder.prompts, "-o", folder.answers, *STEADY])
    other.close()
    refused((status, *capsys.readouterr()), "out.jsonl: cannot write: another process does")
    assert folder.run(capsys, model, *STEADY)[0] == 0


def test_going_on_after_a_kill(model, folder, capsys):
    folder.write(*({"prompt": "a", "max_tokens": 5 if i % 2 else 50_000} for i in range(20)))
    with subprocess.Popen([*KVRUN, "batch", model, folder.prompts, "-o", folder.answers, "--ignore-eos"]) as process:
        end = time.monotonic() + WAIT
        while not os.path.exists(folder.answers) or not os.path.getsize(folder.answers):
            assert time.monotonic() < end
            time.sleep(0.01)
        process.kill()
    folder.write(*({"prompt": "a", "max_tokens": 5} for i in range(20)))
    status, records, _err = folder.run(capsys, model, "--ignore-eos")
    assert status == 0 and sorted(record["line"] for record in records) == list(range(1, 21))


# --- input and output -----------------------------------------------------------------------------


def test_standard_input_and_output(model):
    lines = b'\xef\xbb\xbf{"prompt": "a"}\r\n\n{"prompt": "b"}'
    status, out, err = command("batch", model, "-", *STEADY, stdin=lines)
    loaded = kvrun.load(model)
    assert status == 0 and err.startswith("[2 answers")
    assert texts(map(json.loads, out.splitlines())) == {
        number: loaded.generate(prompt, max_tokens=12, seed=3, ignore_eos=True)
        for number, prompt in ((1, "a"), (3, "b"))
    }
    assert command("batch", model, "-", "-q", stdin=b"") == (0, b"", "")


def test_the_default_model(model, folder, tmp_path):
    os.makedirs(tmp_path / "kvrun")
    os.symlink(model, tmp_path / "kvrun" / "smollm2-135m-instruct.bin")
    folder.write({"prompt": "a"})
    for arguments in ([folder.prompts, "-o", folder.answers], ["-o", folder.answers, folder.prompts]):
        assert command("batch", *arguments, "-q", *STEADY, env={"XDG_CACHE_HOME": str(tmp_path)}) == (0, b"", "")
        assert folder.records()[0]["line"] == 1


def test_input_that_is_still_being_written(model):
    """An answer comes while the next line has not been written, and only a few lines are taken ahead."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    with subprocess.Popen([*KVRUN, "batch", model, "-", "-q", *STEADY], **pipes) as process:
        for number in (1, 2, 3):
            process.stdin.write(b'{"prompt": ')
            process.stdin.write(b'"a"}\n')
            assert json.loads(process.stdout.readline())["line"] == number
        process.stdin.close()
        assert process.wait(WAIT) == 0


def test_input_is_read_as_it_is_needed(model):
    line = b'{"prompt": "a"%s}\n' % (b" " * 65_536)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    command = [*KVRUN, "batch", model, "-", "-q", "--parallel", "1", "--threads", "1", "--ignore-eos"]
    with subprocess.Popen(command, **pipes) as process:
        os.set_blocking(process.stdin.fileno(), False)
        data = memoryview(100 * line)
        for _ in range(100):
            try:
                data = data[os.write(process.stdin.fileno(), data) :]
            except BlockingIOError:
                time.sleep(0.02)
        assert 80 * len(line) < len(data) < 99 * len(line)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 128 + signal.SIGTERM


def test_what_cannot_be_read_or_written(model, folder, tmp_path, capsys):
    def called(*arguments):
        status = cli.main(["batch", *map(str, arguments)])
        return (status, *capsys.readouterr())

    folder.write({"prompt": "a"})
    refused(called(model, tmp_path / "none", "-o", folder.answers), "none: No such file")
    refused(called(model, tmp_path, "-o", folder.answers), "Is a directory")
    refused(called(tmp_path / "none.bin", folder.prompts, "-o", folder.answers), "none.bin")
    refused(called(model, folder.prompts, "-o", tmp_path), "it is a folder")
    refused(called(model, folder.prompts, "-o", tmp_path / "none" / "out"), "there is no folder")
    refused(called(model, folder.prompts, "-o", folder.prompts), "is the file of the prompts")
    refused(called(model, folder.prompts, "-o", folder.answers, "--temperature", "-1"), "temperature")
    refused(called(model, folder.prompts, "-o", folder.answers, "--no-think"), "--no-think")
    refused(called(model, folder.prompts, "-o", folder.answers, "--parallel", "0"), "parallel")
    refused(called(model, folder.prompts, "-o", folder.answers, "--kv", "q5"), "kv")
    refused(called(model, folder.prompts, "x", "-o", folder.answers), "unrecognized", status=2)
    refused(called("-o", folder.answers), "IN.jsonl", status=2)
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_standard_output_that_is_full(model, folder):
    folder.write({"prompt": "a"})
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*KVRUN, "batch", model, folder.prompts, *STEADY], stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"kvrun: standard output: No space left on device\n")


def test_a_record_that_does_not_fit_leaves_nothing(folder, monkeypatch):
    file = batch_files.RecordFile(folder.answers)
    file.write({"line": 1})
    write = os.write

    def full(fd, data):
        if len(data) < 100:
            raise OSError(28, "No space left on device")
        return write(fd, data[:100])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(kvrun.KvrunError, match=r"out.jsonl: cannot write: No space left on device"):
        file.write({"line": 2, "text": "a" * 150})
    file.close()
    assert folder.records() == [{"line": 1}]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_lines(model, folder, number):
    folder.write(*({"prompt": "a", "max_tokens": 5 if i % 2 else -1} for i in range(40)))
    arguments = ["batch", model, folder.prompts, "--ignore-eos", "--parallel", "30"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
    with subprocess.Popen([*KVRUN, *arguments], **pipes) as process:
        first = process.stdout.readline()
        process.send_signal(number)
        out, err = process.communicate(timeout=WAIT)
        assert (process.returncode, err) == (128 + number, b"")
    assert all("text" in json.loads(line) for line in (first + out).split(b"\n")[:-1])


def test_progress_on_a_terminal(model, folder):
    folder.write(*({"prompt": "a", "max_tokens": 200} for _ in range(20)), b"{")
    terminal = Terminal("batch", model, folder.prompts, "-o", folder.answers, "--ignore-eos", "--parallel", "2")
    terminal.read(r"\d+/21\S* lines, [\d.]+ tok/s")
    terminal.read(r"\[20 answers, 1 error; .*1 of 21 lines have errors")
    assert terminal.status() == 1
    assert len(folder.records()) == 21
