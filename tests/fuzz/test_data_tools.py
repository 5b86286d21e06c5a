"""The data tools on strange and broken files: they are read correctly, or refused with one line."""

import json

from hypothesis import assume, example, given
from hypothesis import strategies as st

from hapo_verl.algo.demonstration import REASONS, Refusal, Response, demonstration_turns
from hapo_verl.data.demonstrations import COLUMNS, Judge, verified, write_report
from hapo_verl.data.gsm8k import Problem, gsm8k_problem, read_jsonl, verified_rows
from hapo_verl.data.parquet import DataError, read_parquet, write_parquet
from tests.fuzz.campaign import campaign, is_one_line, texts, values

records = st.fixed_dictionaries({}, optional={"question": values, "answer": values, "more": values})
problems = st.fixed_dictionaries({"question": texts, "answer": st.builds("{}\n#### {}".format, texts, st.integers())})

encodings = st.sampled_from(["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le", "cp1252", "shift_jis"])
line_ends = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\r", b"\x00\n"])


@st.composite
def files(draw):
    """JSON lines in an encoding, some of them broken, or any bytes."""
    if draw(st.booleans()):
        return draw(st.binary(max_size=200))
    encoding, end = draw(encodings), draw(line_ends)
    lines = [
        json.dumps(draw(st.one_of(records, values)), ensure_ascii=draw(st.booleans())).encode(encoding, "replace")
        for _ in range(draw(st.integers(0, 4)))
    ]
    broken = draw(st.sampled_from([b"", b"{", b"[1]", b"1" * 5000, b"[" * 100_000, b'{"a": NaN}', b"\xff\xfe"]))
    return end.join([*lines, broken])


@campaign
@given(content=files())
def test_any_file_is_read_or_refused_with_the_line_number(tmp_path, content):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content)
    try:
        records = list(read_jsonl(path))
    except DataError as error:
        assert is_one_line(error)
        assert str(error).startswith(f"--input {path}, line ")
    else:
        assert all(isinstance(record, dict) for record in records)
        for record in records:
            found = gsm8k_problem(record)
            assert isinstance(found, Problem) or found.startswith("no ")


@campaign
@given(problems=st.lists(problems, min_size=1, max_size=3), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_what_is_json_comes_back_as_it_is(tmp_path, problems, end, bom):
    path = tmp_path / "in.jsonl"
    text = end.join(json.dumps(problem) for problem in problems)
    path.write_bytes(text.encode("utf-8-sig" if bom else "utf-8"))
    assert list(read_jsonl(path)) == problems


@campaign
@given(records=st.lists(st.one_of(records, problems), max_size=4))
def test_every_record_becomes_a_row_or_a_reason_and_rows_survive_the_file(tmp_path, records):
    rows, left_out = verified_rows(records, lambda source, solution, truth: float(len(solution) % 3 > 0), split="train")
    assert len(rows) + left_out.total() == len(records)
    if rows:
        write_parquet(rows, tmp_path / "train.parquet")
        assert list(read_parquet(tmp_path / "train.parquet")) == rows


calls = st.one_of(
    values,
    st.lists(
        st.fixed_dictionaries(
            {}, optional={"function": st.one_of(values, st.fixed_dictionaries({"name": values, "arguments": values}))}
        )
    ),
)
messages = st.fixed_dictionaries(
    {"role": st.one_of(st.sampled_from(["assistant", "tool", "user"]), values)},
    optional={"content": values, "tool_calls": calls},
)
demonstrations = st.one_of(values, st.lists(messages, max_size=4))


@campaign
@given(value=demonstrations)
@example(value=5)
@example(value=[{"role": "assistant", "content": "a", "tool_calls": 3}])
@example(value=[{"role": "assistant", "content": "a", "tool_calls": {"function": 1}}])
def test_any_value_of_a_column_is_turns_or_has_a_reason(value):
    turns = demonstration_turns(value)
    if isinstance(turns, Refusal):
        assert turns.reason in REASONS
    else:
        assert turns
        assert all(isinstance(turn.text, str) and (turn.text.strip() or turn.calls) for turn in turns)
        assert not turns[-1].answers


def judge():
    """A judge with one token per character, for which a text with an even number of characters is a success."""

    def respond(value, row):
        turns = demonstration_turns(value)
        if isinstance(turns, Refusal):
            return turns
        tokens = [ord(char) for turn in turns for char in turn.text] or [0]
        return Response(tokens, [1] * len(tokens), len(turns))

    return Judge(respond, lambda tokens: "".join(map(chr, tokens)), lambda row, text, turns: len(text) % 2 == 0)


@campaign
@given(
    column=st.sampled_from(sorted(COLUMNS)), cells=st.lists(demonstrations, min_size=1, max_size=4), only=st.booleans()
)
def test_every_row_is_kept_with_what_was_chosen_or_named_with_its_reason(tmp_path, column, cells, only):
    rows = [{"prompt": "1?", "extra_info": {"index": number}, column: cell} for number, cell in enumerate(cells)]
    chosen = [judge().choose(row, column) for row in rows]
    kept, rejected = verified(rows, chosen, column, only_verified=only)
    assert [line["row"] for line in rejected] == [i for i, choice in enumerate(chosen) if isinstance(choice, Refusal)]
    assert len(kept) == len(rows) - only * len(rejected)
    assert all(column not in row for row in kept)
    reasons = write_report(rejected, tmp_path / "report.jsonl")
    assert reasons.total() == len(rejected)
    assert set(reasons) <= set(REASONS)
    assume(all(not isinstance(choice, list) for choice in chosen))
    if kept:
        write_parquet(kept, tmp_path / "out.parquet")
        assert list(read_parquet(tmp_path / "out.parquet")) == kept


@campaign
@given(content=st.binary(max_size=300), cut=st.integers(0, 400), flip=st.integers(0, 400), whole=st.booleans())
def test_a_damaged_parquet_file_is_read_or_refused_in_one_line(tmp_path, content, cut, flip, whole):
    path = tmp_path / "in.parquet"
    if whole:
        write_parquet([{"prompt": [{"role": "user", "content": "1?"}], "demonstration": "1"}] * 3, path)
        content = bytearray(path.read_bytes()[: -cut or None])
        if content:
            content[flip % len(content)] ^= 0xFF
    path.write_bytes(content)
    try:
        rows = list(read_parquet(path))
    except DataError as error:
        assert is_one_line(error)
    else:
        assert all(isinstance(row, dict) for row in rows)
