"""Names of models, runs, files and values that others recorded are text in a card, and nothing else.

Each card is rendered by a Markdown renderer; no tag, link, heading or key of the front matter comes from a name.
"""

from collections import Counter
from html.parser import HTMLParser
from typing import Any

import markdown  # type: ignore[import-untyped]
import pytest
import yaml

from finetune.cards import adapter_card, vllm_card
from finetune.merge.report import report_card
from tests.unit.test_cards import REPORT

NAMES = [
    "<script>alert(1)<script>",
    "<img src=x onerror=alert(1)>|`x`.jsonl",
    "base\n---\nlicense: mit\n# owned\n[x](javascript:alert(1))",
    "a\n\n# owned\n.jsonl",
    "[x](https:evil.example)",
    "![x](x:evil)",
    "<https:evil>",
    "www.evil.example",
    "``` \n<b>x</b>\n```",
    "x` <b>x</b> `y",
    "``x``<i>y</i>```",
    "~~~\n<b>",
    "**bold** __bold__ *it* _it_ ~~no~~",
    "a | b | <b>c</b>",
    "a \\| b \\` <u>c</u>",
    "- item\n- item",
    "1. item",
    "> quoted",
    "# heading",
    "x\n===",
    "x\r---\r<hr>",
    "&lt;b&gt; &#60;b&#62;",
    "a\u2028<b>\u2028b",
    "\x1b]0;pwned\x07\x1b[31m",
    "\u202egnp.exe",
    "x: [y]: 1",
    "[ref]: javascript:alert(1)",
    "!!python/object:os.system",
    "'\"---\n...\nlicense: mit",
    "a<!-- \n\n -->b",
    "{{ x }} ${x} $$x$$ @someone #1",
    "",
    " ",
]
TAGS_OF_A_NAME = {"code"}
SHA = "a" * 64


class Tags(HTMLParser):
    """The tags of a page with their attributes, and the text of its headings."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: Counter[str] = Counter()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[f"{tag} {sorted(name for name, _ in attrs)}"] += 1

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.found["comment"] += 1


def rendered(card: str) -> tuple[dict[str, Any], Tags]:
    """The front matter, as the hub reads it, and the page."""
    assert card.startswith("---\n")
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    facts: dict[str, Any] = yaml.safe_load(front)
    return facts, Tags(markdown.markdown(body, extensions=["tables", "fenced_code"]))


def record(name: str) -> dict[str, Any]:
    """A record of an adapter in which everything is called `name`."""
    return {
        "base": {"name_or_path": name, "fingerprint": name},
        "data": {name: [{"name": name, "rows": 3, "tokens": 9, "content": name, "digest": name}]},
        "metrics": {name: {name: name, "loss": 1.0}},
        "versions": {name: name},
        "template_sha256": name,
        "template_day": name,
        "template_args": {name: name},
        "quantization": name,
        "recipe": {
            "output_dir": name,
            "method": {"kind": name},
            "lora": {"r": name, "targets": [name], "expert_r": name},
            "data": {"train": {"path": name, "format": name}, name: [name, {name: name}]},
        },
    }


def merged(name: str) -> str:
    report = {
        **REPORT,
        "base": f"/models/{name}",
        "adapters": [{"name_or_path": f"runs/{name}/adapter", "sha256": name, "weight": 0.5, "base_recorded": True}],
    }
    return report_card(report, [record(name)], f"out/{name}")


def exported(name: str) -> str:
    facts = {
        "base": {"name_or_path": name, "fingerprint": name},
        "adapter": {"name_or_path": name, "sha256": name},
        "max_lora_rank": 8,
        "stop_token_ids": [2],
    }
    return vllm_card(record(name), facts)


@pytest.mark.parametrize("card", [merged, exported, lambda name: adapter_card(record(name))])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_in_a_card(card: Any, name: str) -> None:
    plain_facts, plain = rendered(card("plain"))
    facts, page = rendered(card(name))
    assert facts.keys() == plain_facts.keys()
    assert set(facts["tags"]) <= {"moe-finetune", "lora", "merged", "sft", "plain"}
    more = page.found - plain.found
    assert {tag.split()[0] for tag in more} <= TAGS_OF_A_NAME, more
    assert all(tag.endswith("[]") for tag in more), more
    assert "\x1b" not in card(name)
    assert "\u202e" not in card(name)
    assert "\u2028" not in card(name)


def test_the_renderer_shows_what_is_not_escaped() -> None:
    """The test would notice: the same name as it is becomes a tag and a link."""
    _, page = rendered("---\nx: 1\n---\n\n# <b>x</b> [x](https:evil)\n")
    assert page.found["b []"] == 1
    assert page.found["a ['href']"] == 1


@pytest.mark.parametrize("data", [7, [7], {"train": 7}, {"train": [7]}, None])
def test_a_record_in_another_form_is_no_failure(data: Any) -> None:
    """It is another tool's or version's; the merge itself is proven by then."""
    strange = {**record("plain"), "recipe": {"data": data, "lora": {}, "method": {}}, "metrics": {"eval": 7}}
    assert "recorded in another form than this program writes" in report_card(REPORT, [strange], "out/plain")


def test_a_plain_name_is_shown_as_it_is() -> None:
    card = merged("my_model-2.1 (final), v2: 50%")
    assert "# my_model-2.1 (final), v2: 50%\n" in card
