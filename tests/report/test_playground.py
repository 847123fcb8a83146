"""The pieces of the playground's page: what they say, and that no text gets out of its place."""

import re
from html.parser import HTMLParser

import pytest

from sense_v2.report import playground

HOSTILE = "</pre><script>alert(1)</script>\"'`&amp;{{7*7}}{% raw %}"


class Read(HTMLParser):
    """Elements and attributes of a piece, and its texts as a browser would show them."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.attributes, self.open, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == [], "an element was left open"

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += [name for name, _ in attributes]
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join("".join(self.texts).split())


def side(tokens, probabilities, others):
    candidates = [
        [[token, probability], ["else", 0.01]] for token, probability in zip(tokens, probabilities, strict=True)
    ]
    return {
        "tokens": tokens,
        "probabilities": probabilities,
        "other_probabilities": others,
        "candidates": candidates,
    }


def compared(with_memory, without):
    found = {"prompt_tokens": 3, "dropped_tokens": 0}
    return found | {"with_memory": side(*with_memory), "without_memory": side(*without)}


def inspected(tokens, probabilities=None, **layer):
    count = len(tokens)
    probabilities = [None, *[0.25] * (count - 1)] if probabilities is None else probabilities
    return {
        "dropped_tokens": 0,
        "tokens": tokens,
        "token_ids": list(range(100, 100 + count)),
        "compressed_ids": list(range(count)),
        "ngrams": {2: ["".join(tokens[max(0, i - 1) : i + 1]) for i in range(count)], 3: ["xyz"] * count},
        "layers": [
            {
                "layer": 1,
                "gates": [0.5] * count,
                "shares": {2: [0.12] * count, 3: [0.5] * count},
                "row_ids": [[11, 12, 13, 14]] * count,
                "row_norms": [[1.0, 2.0, 3.0, 4.0]] * count,
                **layer,
            }
        ],
        "probabilities": {"with_memory": probabilities, "without_memory": probabilities},
    }


def test_a_comparison_marks_what_differs_and_says_where_the_texts_part():
    found = compared(
        ([" the", " cat", " sat"], [0.9, 0.5, 0.8], [0.9, 0.1, 0.79]),
        ([" the", " dog", " sat"], [0.9, 0.4, 0.7], [0.9, 0.2, 0.3]),
    )
    html = playground.comparison(found)
    marked = re.findall(r'<span class="differs" tabindex="0"><span class="tip" role="tooltip"><b>(.*?)</b>', html)
    assert marked == ["·cat", "·dog"]
    text = Read(html).text
    assert "They part at token 2: with memory “·cat” (50 %), without “·dog” (40 %)." in text.replace("\xa0", " ")
    assert "at least doubled the probability of 1 of the 3 tokens" in text
    assert "with memory50 %without memory10 %1. ·cat50 %2. else1.0 %" in "".join(Read(html).texts).replace(
        "\xa0", " "
    )


def test_equal_continuations_are_called_equal():
    same = ([" a", " b"], [0.5, 0.5], [0.5, 0.5])
    text = Read(playground.comparison(compared(same, same))).text
    assert text.startswith("Both write the same 2 tokens. Memory at least doubled the probability of 0 of the 2")
    assert 'class="differs" tabindex' not in playground.comparison(compared(same, same))


def test_one_that_ends_earlier():
    text = playground.parting(compared(([" a"] * 2, [0.5] * 2, [0.5] * 2), ([" a"] * 3, [0.5] * 3, [0.5] * 3)))
    assert text.startswith("One of them ends after 2 tokens; up to there they are the same.")


def test_empty_lines_take_one_line_in_a_row():
    endless = (["\n"] * 40, [0.5] * 40, [0.5] * 40)
    pre = re.search("<pre.*?</pre>", playground.comparison(compared(endless, endless)), re.DOTALL)[0]
    shown = re.sub(r'<span class="tip".*?</span></span>(?=[^<])', "", pre)
    assert shown.count("\n") == 2
    assert shown.count("↵") == 40


def test_an_inspected_text_opens_its_rows_and_says_which_were_taught():
    found = inspected(["a", "b"], moved=[[False] * 4, [True, False, True, False]])
    text = "".join(Read(playground.inspection(found)).texts).replace("\xa0", " ")
    assert "token id101compressed id12-gramabprobability with memory25 %probability without memory25 %" in text
    assert (
        "rows, 2-gram11 12their norms1.00 2.00they add12 % of the hidden state’s length"
        "rows, 3-gram13 14their norms3.00 4.00they add50 % of the hidden state’s length" in text
    )
    assert text.count("taught here2 of these 4 rows") == 1
    assert "token id100compressed id0gate0.500rows, 2-gram" in text  # nothing was expected before the first token
    table = Read(playground.rows_table(found))
    assert table.elements.count("tr") == 3
    assert "11 12 13 14" in table.text


def test_without_a_text_there_is_a_word_for_it():
    nothing = inspected([])
    assert "Type something" in Read(playground.inspection(nothing)).text
    assert "There is no text" in Read(playground.rows_table(nothing)).text


def lesson(text="Lutz", watched=(), losses=(2.3, 0.1, 0.05)):
    return {
        "prompt": "It is",
        "text": text,
        "losses": list(losses),
        "said": losses[-1] < 1,
        "rows": 12,
        "table_rows": 1500,
        "continued": ["before", "now"],
        "watched": list(watched),
    }


def test_a_lesson_says_what_was_learned_and_what_else_moved():
    before = inspected(["a", "b", "c"], [None, 0.5, 0.2])
    after = inspected(["a", "b", "c"], [None, 0.49, 0.02])
    html = playground.lesson(lesson(watched=[{"before": before, "after": after, "moved": [True, False, True]}]))
    text = Read(html).text.replace("\xa0", " ")
    assert "a probability of 10 % (the geometric mean), and now gives it 95 %" in text
    assert "2 steps moved 12 of the table’s 1,500 rows" in text
    assert "wasn’t learned" not in text
    assert "It wasn’t learned: another token is" in Read(playground.lesson(lesson(losses=(4.44, 2.97)))).text
    assert "2 of 3 tokens look up a row that moved. Most changed: c 20 % → 2.0 %, 10 times less likely." in text
    assert re.findall(r'<span class="([^"]*)" tabindex', html) == ["moved", "", "down4 moved"]


def test_a_lesson_that_moved_nothing_else_says_so():
    same = inspected(["a", "b"], [None, 0.5])
    text = Read(playground.lesson(lesson(watched=[{"before": same, "after": same, "moved": [False, False]}]))).text
    assert "0 of 2 tokens look up a row that moved. No token changed by more than a twentieth." in text
    assert "No text is watched." in Read(playground.lesson(lesson())).text


@pytest.mark.parametrize("text", [HOSTILE, "\ud800 \u202e \x00", "", " ", "\n\n"])
def test_no_text_gets_out_of_its_place(text):
    harmless = "x"

    def pieces(text):
        one = inspected([text, text], moved=[[True] * 4] * 2)
        watched = [{"before": one, "after": one, "moved": [True, True]}]
        yield playground.comparison(compared(([text], [0.5], [0.1]), ([text, text], [0.5, 0.5], [0.1, 0.1])))
        yield playground.inspection(one)
        yield playground.rows_table(one)
        yield playground.lesson({**lesson(text, watched), "prompt": text, "continued": [text, text]})
        yield playground.facts([(text, text), (harmless, text)], 3)
        yield playground.saved(f"/home/{text}", 3, 4000, model=f"runs/{text}")
        yield playground.refusal(f"a {text}", f"b {text}")
        yield playground.note(f"a {text}")

    for hostile, plain in zip(pieces(text), pieces(harmless), strict=True):
        hostile.encode("utf-8")
        read, expected = Read(hostile), Read(plain)
        assert (sorted(set(read.elements)), sorted(set(read.attributes))) == (
            sorted(set(expected.elements)),
            sorted(set(expected.attributes)),
        )
        assert not re.search("[\x00\u202e]", hostile)
        if text == HOSTILE:
            assert "alert(1)" in read.text
            assert "{{7*7}}" in read.text


def test_the_stylesheet_stays_within_its_pieces():
    css = re.sub(r"/\*.*?\*/", "", playground.stylesheet(), flags=re.DOTALL)
    assert css.count("{") == css.count("}")
    assert not re.search(r"(^|[\s,}]):root|(^|[\s,}])(html|body|main)\b[^;{}]*\{", css)
    assert "prefers-color-scheme" not in css
    assert "url(" not in css
    assert "</style" not in css
    # The reports' rules are one block, and every other rule names .sense or what is Gradio's.
    depth, selectors = 0, []
    for part in re.split(r"([{}])", css):
        if part == "{":
            depth += 1
        elif part == "}":
            depth -= 1
        elif depth == 0 and part.strip():
            selectors.append(part.strip())
    assert selectors[0] == ".sense"
    for selector in selectors:
        assert re.match(r"(\.sense|\.dark \.sense|\.gradio-container|footer|@media)", selector), selector
