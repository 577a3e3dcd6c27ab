"""Facts about the translations: the nodes' own keys in every language, nothing that ComfyUI would misread."""

import json
import re

import pytest

from .make_locales import LOCALES, english, languages, leaves, problems, read

# What stays as it is in every language: numbers, model folders, names of things, options and tracks of the schedule.
FIXED = re.compile(
    r"models/\w+|@\w+|\b[a-z]+:\d[\d.]*-\d[\d.]*\d|\d+(?:\.\d+)?|[A-Z]{3,}\w*|\bDiT\b|\bLoRA\b|\bdiffusers\b"
)
OTHERS = [language for language in languages() if language != "en"]


@pytest.fixture(scope="module")
def infos(client):
    return client.object_info()


def shown(node: dict) -> str:
    """The name by which texts call a node."""
    return re.sub(r"\s*[(（].*", "", node["display_name"])


def test_every_language_has_the_keys_of_the_schemas(infos):
    assert problems(english(infos)) == []


def test_the_server_serves_every_language(client):
    served = json.loads(client.text("/i18n"))
    for language in languages():
        ours = {name: node for name, node in served[language]["nodeDefs"].items() if name.startswith("UniFusion")}
        assert ours == read(language)


@pytest.mark.parametrize("language", OTHERS)
def test_the_categories_translated_are_ours(infos, language):
    """The other parts of our categories' names are ComfyUI's own."""
    ours = {part for name in read("en") for part in infos[name]["category"].split("/")}
    words = json.loads((LOCALES / language / "main.json").read_text(encoding="utf-8"))
    assert set(words) == {"nodeCategories"} and set(words["nodeCategories"]) <= ours


@pytest.mark.parametrize("language", OTHERS)
def test_nothing_is_left_empty(language):
    assert [key for key, text in leaves(read(language)).items() if not text.strip()] == []


@pytest.mark.parametrize("language", OTHERS)
def test_sentences_are_translated(language):
    own, words = leaves(read("en")), leaves(read(language))
    sentences = [key for key in own if key.endswith((".description", ".tooltip"))]
    assert [key for key in sentences if words[key] == own[key]] == []


@pytest.mark.parametrize("language", languages())
def test_what_vue_i18n_compiles_has_none_of_its_syntax(language):
    """Tooltips are read as they are; titles, descriptions and names are compiled."""
    compiled = {key: text for key, text in leaves(read(language)).items() if not key.endswith(".tooltip")}
    assert [key for key, text in compiled.items() if set(text) & set("{}@|$")] == []


@pytest.mark.parametrize("language", OTHERS)
def test_numbers_folders_and_proper_names_survive(language):
    own, words = leaves(read("en")), leaves(read(language))
    lost = [(key, found) for key, text in own.items() for found in FIXED.findall(text) if found not in words[key]]
    assert [(key, found) for key, found in lost if not key.endswith(".name")] == []


@pytest.mark.parametrize("language", OTHERS)
def test_texts_call_a_node_by_its_title(language):
    """Where the English text names a node, the translation names it by its own title."""
    own, words = read("en"), read(language)
    titles = sorted(((shown(own[name]), shown(words[name])) for name in own), key=lambda pair: -len(pair[0]))
    translated = leaves(words)
    for key, text in leaves(own).items():
        if key.endswith(".display_name"):
            continue
        for here, there in titles:
            if here in text:
                assert there in translated[key], key
                text = text.replace(here, "")


@pytest.mark.parametrize("language", OTHERS)
def test_two_nodes_never_share_a_title(language):
    titles = [node["display_name"] for node in read(language).values()]
    assert len(set(titles)) == len(titles)
