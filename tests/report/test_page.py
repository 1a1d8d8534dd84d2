import math
import re
from html.parser import HTMLParser

import pytest

from qtune.report import write_report
from qtune.report.files import NOT_MEASURED
from qtune.report.numbers import DASH, SPACE

VOID = {"meta", "br", "img", "link", "input", "hr"}
SECTIONS = [
    "evaluation",
    "fields",
    "tasks",
    "merge",
    "exports",
    "training",
    "memory",
    "samples",
    "prompts",
    "layers",
    "recipe",
    "environment",
]


class Page(HTMLParser):
    """What a page holds; an AssertionError where its elements do not nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.tables, self.words = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
        if tag == "table":
            self.rows.clear()
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()[0] == tag, (tag, self.open, self.getpos())

    def handle_data(self, data):
        tags = [tag for tag, _ in self.open]
        if "style" not in tags:
            self.words.append(data)
        if {"th", "td"} & set(tags):
            self.rows[-1][-1] = f"{self.rows[-1][-1]} {data.replace(SPACE, ' ').strip()}".strip()

    @property
    def rows(self):
        """Rows of the table read last, by the section it is in."""
        section = next(a["id"] for tag, a in reversed(self.open) if tag == "section")
        return self.tables.setdefault(section, [])

    @property
    def text(self):
        return " ".join(" ".join(self.words).replace(SPACE, " ").split())

    def named(self, tag):
        return [attributes for found, attributes in self.elements if found == tag]


def page_of(run):
    write_report(run)
    return shown(run)


def shown(run):
    return Page(run.report.read_text())


def test_a_finished_run_has_every_section_in_order(reported):
    page = shown(reported)
    assert [section["id"] for section in page.named("section")] == SECTIONS
    assert "JSON match 0 % → 93 % on 100 unseen requests" in page.text


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ("eval.json", ["evaluation", "fields", "tasks"]),
        ("merge.json", []),
        ("samples.json", ["samples"]),
        ("prompts.json", ["prompts"]),
        ("metrics.jsonl", ["training"]),
        ("plan.json", ["memory", "layers"]),
        ("environment.json", ["environment"]),
        ("recipe.yaml", ["recipe"]),
        ("export/*/qtune.json", ["exports"]),
    ],
)
def test_a_missing_file_leaves_out_its_section(finished, missing, gone):
    for path in finished.path.glob(missing):
        path.unlink()
    sections = [section["id"] for section in page_of(finished).named("section")]
    assert sections == [section for section in SECTIONS if section not in gone]


def test_a_run_that_only_trained_has_a_page(trained):
    page = page_of(trained)
    sections = [section["id"] for section in page.named("section")]
    assert sections == ["training", "memory", "layers", "recipe"]


def test_a_run_that_has_written_nothing_has_a_page(trained):
    for path in trained.path.iterdir():
        path.unlink()
    page = page_of(trained)
    assert not page.named("section") and "Nothing has been trained yet." in page.text
    assert "SmolLM2-135M-Instruct" in page.text


def test_the_evaluation_is_that_of_the_file(reported, measured):
    heading, *rows = shown(reported).tables["evaluation"]
    columns = {name: heading.index(name) for name in heading}
    for row, found in zip(rows, measured, strict=True):
        assert row[0].startswith(found["name"])
        change = ""
        if found["nats"] is not None:
            change = f" {found['nats']:+.4f} ± {found['standard_error']:.4f}"
        assert row[columns["Loss"]] == f"{found['loss']:.4f}{change}"
        assert row[columns["Recovery"]] == f"{100 * found['recovery']:.1f} %"
        assert row[columns["Perplexity"]] == f"{found['perplexity']:.3f}"
        assert row[columns["Top-1"]] == f"{100 * found['top1']:.1f} %"
        assert row[columns["Size"]] == f"{found['size_bytes'] / 1e6:.1f} MB"
    kl = [row[columns["KL"]] for row in rows]
    assert kl[:6] == ["2.7144", "2.8021", "0.0000", "0.0039", "< 0.0001", "0.0039"]
    assert [row[columns["JSON match"]] for row in rows[:6]] == [
        *("0 %", "0 %", "93 %", "92 %", "93 %", DASH)
    ]
    # the interval of 93 in 100 by Wilson's formula is 86.25 to 96.57
    assert rows[2][2] == f"86{DASH}97 %" and rows[5][2] == ""
    assert rows[0][2] == f"0{DASH}4 % p < 0.001" and rows[3][2] == f"85{DASH}96 % p 0.031"
    assert [row[-1] for row in rows[:6]] == ["61.3"] * 4 + [DASH, "61.3"]


def test_a_table_of_an_earlier_release_has_a_page(finished):
    table = finished.read("eval.json")
    for row in table["rows"]:
        for key in NOT_MEASURED:
            del row[key]
    finished.write("eval.json", table)
    page = page_of(finished)
    heading, *rows = page.tables["evaluation"]
    assert "Exact match" in heading and rows[2][2] == f"86{DASH}97 %"
    assert rows[0][heading.index("Recovery")] == DASH
    assert "tasks" not in [section["id"] for section in page.named("section")]


def test_tasks_and_text_are_those_of_the_file(reported, measured):
    heading, *rows = shown(reported).tables["tasks"]
    assert heading == [
        *("Model", "Bits per byte", "Word perplexity"),
        *("gsm8k, exact match (strict-match)", "hellaswag, acc norm"),
    ]
    text = measured[0]["text"]
    bits = text["nats"] / math.log(2) / text["bytes"]
    words = math.exp(text["nats"] / text["words"])
    assert rows[0] == [
        "base 16-bit",
        f"{bits:.4f}",
        f"{words:.2f}",
        f"17.0 % (13{DASH}22)",
        f"43.0 % (38{DASH}48) *",
    ]
    assert rows[2][0] == "adapter on nf4" and "*" not in rows[2][-1]
    assert "wiki.txt, 10,000 bytes, 1,980 words, 2,400 tokens" in shown(reported).text


def test_fields_are_those_of_the_file(reported):
    rows = shown(reported).tables["fields"]
    assert rows[0] == ["Model", "date", "amount", "category"]
    assert ["adapter on nf4", "97 %", "100 %", "95 %"] in rows
    # neither has a right field, and the bf16 export was not asked
    assert not {"base nf4", "export bf16"} & {row[0] for row in rows}


def test_charts_say_in_words_what_they_show(reported):
    labels = [svg.get("aria-label", "") for svg in shown(reported).named("svg")]
    labels = [label.replace(SPACE, " ") for label in labels]
    (quality, _) = [label for label in labels if label.startswith("Recovery over size")]
    assert "gguf-q4_k_m 97.7 % at 105 MB" in quality
    assert "adapter on nf4 100.0 %, exact, at 136 MB" in quality
    # neither what was not tuned, nor the adapter, which needs a base beside it
    assert "base" not in quality and "adapter 100.0" not in quality
    assert any(label.startswith("hellaswag, acc norm: base 16-bit 0.43") for label in labels)
    assert any(label.startswith("q_proj: the adapter changes weights by 0.8") for label in labels)


def test_a_refused_merge_is_told(finished):
    merge = finished.read("merge.json")
    finished.write("merge.json", {**merge, "refused": "merging keeps 61 %"})
    assert "Refused: merging keeps 61 %" in page_of(finished).text


def test_a_list_of_layers_alone_is_read(finished):
    finished.write("merge.json", finished.read("merge.json")["layers"])
    text = page_of(finished).text
    assert "q_proj 1.9 % kept" in text and "Merged onto the original weights" in text


def test_prompts_stand_side_by_side(reported):
    text = shown(reported).text
    assert "adapter on nf4, export bf16 936.39 CHF renamed since 936.39 Reference" in text
    assert "base 16-bit, base nf4 (empty)" in text and "<script>I do not know.</script>" in text


def test_exports_are_marked_in_words(reported):
    rows = shown(reported).tables["evaluation"]
    assert "= exact , read by peft" in rows[5][0]
    assert "≈ not exact , read by transformers" in rows[6][0]
    assert not any("exact" in row[0] for row in rows[1:5])


def test_the_trained_row_stands_out(reported):
    rows = [row.get("class") for row in shown(reported).named("tr")][:7]
    assert rows == [None, None, None, "trained", None, None, None]


def test_the_merge_is_told(reported):
    assert "Merged onto the original weights: its held-out loss" in shown(reported).text


def test_memory_is_that_of_plan_and_figures(reported):
    _, *rows = shown(reported).tables["memory"]
    memory = reported.read("plan.json")["memory"]
    peak = 1_398_000_000 + 1000 * 90
    expected = [[name, size] for name, size in memory.items() if name != "total"]
    expected += [["plan in total", memory["total"]], ["measured peak", peak]]
    assert [row[:2] for row in rows] == [[n, f"{s / 2**20:,.1f} MiB"] for n, s in expected]
    assert rows[-1][2] == f"{100 * peak / memory['total']:.1f} %"


def test_layers_are_summed_by_format(reported):
    _, *rows = shown(reported).tables["layers"]
    nf4, dense = 30 * (576 * 576 + 576 * 1536), 49152 * 576
    size = 30 * ((576 * 576 * 33) // 64 + (576 * 1536 * 33) // 64)
    assert rows[0] == ["bfloat16", "1", f"{dense:,}", "16.00", f"{2 * dense / 1e6:.1f} MB"]
    assert rows[1] == ["nf4", "60", f"{nf4:,}", f"{8 * size / nf4:.2f}", f"{size / 1e6:.1f} MB"]
    assert rows[2][:3] == ["all linear layers", "61", f"{nf4 + dense:,}"]


def test_held_out_losses_are_a_table_too(trained):
    _, *rows = page_of(trained).tables["training"]
    expected = [["30", "0.1421", "2,893"], ["60", "0.0712", "2,893"], ["90", "0.0583", "2,893"]]
    assert rows == expected


def test_samples_are_marked_in_words(reported):
    text = shown(reported).text
    assert "Before ✗ incorrect" in text and "After ✓ correct" in text
    assert "≠ category" in text and "\N{MINUS SIGN} note missing" in text
    signs = {span["aria-label"] for span in shown(reported).named("span") if "aria-label" in span}
    assert signs == {"differs", "not in the reference", "missing"}


def test_what_a_run_wrote_is_inert(reported):
    page = shown(reported)
    assert not page.named("script") and not page.named("img") and not page.named("i")
    attributes = {name for _, found in page.elements for name in found}
    assert not [name for name in attributes if name.startswith("on")]
    for text in (
        "<script>alert('prompt')</script> & <b>bold</b>",
        "</p><script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "<script>x</script>",
        "3.11.2 <script>",
    ):
        assert text in page.text


def test_names_are_escaped_where_they_are_attributes_or_titles(finished):
    table = finished.read("eval.json")
    table["rows"][0]["name"] = table["trained"] = '"><script>'
    table["merge"]["why"] = "</style><script>"
    finished.write("eval.json", table)
    assert not page_of(finished).named("script")


def test_the_page_needs_nothing_beside_itself(reported):
    page = shown(reported)
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href"):
                assert value.startswith("#"), value
    assert not {tag for tag, _ in page.elements} & {"link", "script", "iframe", "object", "base"}
    text = reported.report.read_text()
    assert not re.search(r"https?:|@import|@font-face|url\((?!#)", text)


def test_identifiers_are_unique_and_references_lead_somewhere(reported):
    page = shown(reported)
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(ids) == len(set(ids))
    references = [
        found["aria-labelledby"] for _, found in page.elements if "aria-labelledby" in found
    ]
    references += re.findall(r'(?:url\(|href=")#([\w-]+)', reported.report.read_text())
    assert references and set(references) <= set(ids)


def test_charts_and_tables_are_named_for_those_who_do_not_see_them(reported):
    page = shown(reported)
    for svg in page.named("svg"):
        assert svg.get("aria-hidden") == "true" or svg["aria-label"]
    assert all(cell["scope"] in ("col", "row") for cell in page.named("th"))
    assert page.named("html")[0]["lang"] == "en" and len(page.named("h1")) == 1


def test_light_dark_and_print_are_styled(trained):
    text = write_report(trained).read_text()
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= set(re.findall(r"(--[\w-]+):", text))


def test_the_same_files_give_the_same_page_and_nothing_else_is_left(finished):
    before = set(finished.path.iterdir())
    first = write_report(finished).read_bytes()
    assert write_report(finished) == finished.report
    assert finished.report.read_bytes() == first
    assert set(finished.path.iterdir()) - before == {finished.report}
