"""Numbers have one source: what a report says is what its JSON says, and one of a thing is singular."""

import json
import re
from pathlib import Path

import pytest
from report_pages import Page
from test_report import made_results

from sense_v2.cli.demo import metrics
from sense_v2.report import wording
from sense_v2.report.training import terminal_table, write_report

REPORT = Path(wording.__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(metrics.json, the page's cells by row and label, its text) of the demo."""
    results, path = made_results(), tmp_path_factory.mktemp("report") / "report.html"
    write_report(results, path)
    html = path.read_text(encoding="utf-8")
    rows = {}
    for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", html, re.DOTALL):
        label = re.sub(r"<small>.*?</small>|<[^>]*>", "", row.partition("</th>")[0])
        rows[label] = dict(re.findall(r'data-label="(.*?)">(.*?)</td>', row))
    return json.loads(json.dumps(metrics(results))), rows, Page(html).text.replace("\xa0", " "), results


def test_the_demos_page_and_its_json_say_the_same(made):
    numbers, rows, text, results = made
    for name, perplexity in numbers["perplexity"].items():
        assert rows[results["runs"][name]["label"]]["Perplexity"] == wording.perplexity(perplexity)
    for name, bits in numbers["bits_per_byte"].items():
        assert rows[results["runs"][name]["label"]]["Bits per byte"] == wording.decimals(bits)
    assert re.search(rf"Trained on\s*{wording.count(numbers['tokens'])} tokens in each run", text)
    for name, kept in numbers["gain_kept_by_controls"].items():
        assert f"“{results['runs'][name]['label']}” keeps {wording.percent(kept)} of the gain" in text
    assert f"takes {wording.decimals(numbers['step_times']['ratio'], 2)} times as long" in text
    assert f"{wording.count(numbers['compression']['ids'])} compressed ids" in text
    lookups = numbers["reading"]
    assert f"{wording.count(lookups['calls'])} lookups of {wording.count(lookups['rows'])} rows" in text
    assert f"Everything together took{wording.duration(numbers['seconds'])}" in text


def test_the_terminal_says_the_same_as_the_json(made):
    numbers, _, _, results = made
    table = terminal_table(results)
    for name, perplexity in numbers["perplexity"].items():
        line = next(line for line in table.splitlines() if line.startswith(results["runs"][name]["label"]))
        assert wording.perplexity(perplexity) in line


def test_rows_that_belong_to_no_head_are_accounted_for(made):
    _, _, text, results = made
    heads = sum(head["rows"] for head in results["rows_touched"])
    assert f"of {wording.count(heads)} rows" in text
    spare = results["table"]["rows"] - heads
    assert spare > 0
    assert f"The table has {wording.count(spare)} more: each head gets a prime number of rows" in text


PLURAL = re.compile(r"\bcount\([^{}]*\)\} (?:tokens|steps|sequences|facts|files|heads)\b")


@pytest.mark.parametrize("path", sorted([*REPORT.glob("*.py"), *REPORT.parent.glob("cli/**/*.py")]), ids=str)
def test_one_of_a_thing_is_singular(path):
    """`number_of` says "1 token", `count` and a noun say "1 tokens"; "1 of 1 tokens" is what stays."""
    text = path.read_text(encoding="utf-8")
    for match in PLURAL.finditer(text):
        before = text[: match.start()].rpartition("{")[0]
        assert before.endswith((" of ", " of the ")), match[0]
