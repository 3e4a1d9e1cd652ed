"""A report's folder: the content of each file, pages that load nothing remote and execute no text, replacement."""

import csv
import html
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from steermoe.discovery import page, picture, report
from steermoe.discovery.clustering import Clustering
from steermoe.discovery.discover import Cluster, Discovery, DiscoveryOptions
from steermoe.discovery.keywords import Keyword
from steermoe.discovery.store import EmbeddedTexts, EmbeddingMeta, Text
from steermoe.errors import CorpusError, SteerMoEError
from steermoe.vectors.file import read_vector
from steermoe.vectors.library import find_vectors
from steermoe.vectors.vector import SteeringVector, VectorInfo

EVIL = "<script>alert('x')</script><img src=http://evil.example/x.png onerror=alert(1)> & \"quoted\""
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True, scope="module")
def _extra():
    for module in ("matplotlib", "plotly", "umap"):
        pytest.importorskip(module)


def make_discovery(sizes=(6, 4), noise=2, labels=True, evil=EVIL, names=("goal-team", "bread-pan")) -> Discovery:
    """Clusters as they could have been found: the second has no vector; the last texts are noise."""
    total = sum(sizes) + noise
    groups = np.array([number for number, size in enumerate(sizes) for _ in range(size)] + [-1] * noise)
    known = [("sport", "food")[group % 2] if labels and group >= 0 else "" for group in groups]
    texts = [Text(f"t/{i}", f"Text {i} {evil}", label) for i, label in enumerate(known)]
    frequency = np.full((total, 3, 8), 1 / 8, dtype=np.float32)
    meta = EmbeddingMeta("tiny<b>", "mixtral", (0, 1, 2), 8, 2, complete=True, texts=total)
    random = np.random.default_rng(0)
    places = (random.normal(size=(total, 2)) + 5 * groups[:, None]).astype(np.float32)
    found = Clustering(places, groups, np.ones(total), 2, groups < 0)
    clusters = []
    for number, (size, name) in enumerate(zip(sizes, names, strict=True)):
        mean = torch.full((3, 8), 0.3 / 7)
        mean[:, number % 8] = 0.7
        vector = SteeringVector(
            name, mean, (0, 1, 2), baseline=torch.full((3, 8), 1 / 8), relative=True, info=VectorInfo(model="tiny")
        )
        clusters.append(
            Cluster(
                number=number,
                name=name,
                size=size,
                keywords=(Keyword(name.split("-")[0], 0.5), Keyword("R&D", 0.25)),
                examples=tuple(text.id for text in texts[number * sizes[0] :][:3]),
                labels={("sport", "food")[number % 2]: size} if labels else {},
                purity=1.0 if labels else None,
                vector=vector if number != 1 else None,
                note="" if number != 1 else "no vector: nothing exceeds it",
            )
        )
    options = DiscoveryOptions(3.0, True, 5, 2, 15, "hellinger", False, 0)
    embedded = EmbeddedTexts(meta, texts, np.full(total, 7), frequency)
    return Discovery(embedded, found, tuple(clusters), 0.5 if labels else None, noise, options)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a report, and what `write_report` returned."""
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    return folder, report.write_report(make_discovery(), folder)


def files(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text outside of scripts and styles."""

    def __init__(self, content):
        super().__init__()
        self.tags, self.text, self._raw = [], "", False
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._raw = False

    def handle_data(self, data):
        self.text += "" if self._raw else data

    def links(self):
        return [value for _, attributes in self.tags for name in ("src", "href") if (value := attributes.get(name))]


def test_files(written):
    folder, record = written
    expected = {
        *("index.html", "map.html", "map_clusters.png", "map_sources.png", "clusters.csv", "report.json"),
        *("heat_goal-team.png", "vectors/goal-team.safetensors"),
    }
    assert files(folder) == set(record["files"]) == expected
    for name in expected:
        if name.endswith(".png"):
            assert (folder / name).read_bytes().startswith(PNG)


def test_json(written):
    folder, record = written
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(record))
    assert record["texts"] == 12
    assert record["noise"] == 2
    assert record["adjusted_rand"] == 0.5
    assert record["settings"]["metric"] == "hellinger"
    assert record["embeddings"]["model"] == "tiny<b>"
    assert {"steermoe", "numpy", "umap-learn", "scikit-learn", "plotly", "python"} <= record["versions"].keys()
    first, second = record["clusters"]
    assert first["name"] == "goal-team"
    assert first["keywords"][0] == {"word": "goal", "score": 0.5}
    assert first["examples"] == ["t/0", "t/1", "t/2"]
    assert first["labels"] == {"sport": 6}
    assert (first["vector"], first["picture"]) == ("vectors/goal-team.safetensors", "heat_goal-team.png")
    assert (first["experts"], first["layers"], first["relative"]) == (3, 3, True)
    assert (second["vector"], second["picture"], second["experts"]) == (None, None, 0)
    assert second["note"] == "no vector: nothing exceeds it"


def test_table(written):
    with (written[0] / "clusters.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert rows[0].keys() == {"id", "label", "cluster", "name", "x", "y"}
    assert [row["cluster"] for row in rows] == ["0"] * 6 + ["1"] * 4 + ["-1"] * 2
    assert (rows[0]["name"], rows[6]["name"], rows[11]["name"]) == ("goal-team", "bread-pan", "")
    assert (rows[0]["label"], rows[11]["label"]) == ("sport", "")
    assert float(rows[3]["x"]) == pytest.approx(make_discovery().clustering.map_B2[3, 0], abs=1e-4)


def test_no_cell_of_the_table_is_a_formula(tmp_path):
    found = make_discovery()
    texts = [Text(f"=cmd|{number}", "", "@SUM(1)") for number in range(len(found.embedded))]
    report._write_table(replace(found, embedded=replace(found.embedded, texts=texts)), tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["label"]) for row in rows] == [(f"'=cmd|{n}", "'@SUM(1)") for n in range(12)]
    assert [row["cluster"] for row in rows] == ["0"] * 6 + ["1"] * 4 + ["-1"] * 2


def test_vectors_are_found_as_a_folder_of_vectors(written, monkeypatch):
    monkeypatch.delenv("STEERMOE_VECTORS", raising=False)
    assert "goal-team" in {file.domain for file in find_vectors(written[0] / "vectors")}
    vector = read_vector(written[0] / "vectors" / "goal-team.safetensors")
    assert torch.equal(vector.experts, make_discovery().clusters[0].vector.experts)


# ---- pages ----


def test_index(written):
    page = Page((written[0] / "index.html").read_text())
    assert "script" not in {tag for tag, _ in page.tags}
    for link in page.links():
        assert link.startswith("#") or (written[0] / link).is_file(), link
    assert {"map.html", "map_clusters.png", "map_sources.png", "heat_goal-team.png"} <= set(page.links())
    text = " ".join(page.text.split())
    assert "as tiny<b> routes them" in text
    assert f"Text 0 {EVIL}" in text  # as text, not as a tag
    assert "adjusted Rand index 0.50" in text
    assert "2 texts (17%) are in none" in text
    assert "sport 100%" in text
    assert "No vector: nothing exceeds it." in text
    assert "R&D" in text
    targets = {attributes.get("id") for _, attributes in page.tags}
    assert {link[1:] for link in page.links() if link.startswith("#")} == {"goal-team", "bread-pan"} <= targets


def test_the_map_page_loads_nothing_remote(written):
    content = (written[0] / "map.html").read_text()
    page = Page(content)
    assert page.links() == []
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "http" not in policy
    assert len(content) > 1_000_000  # plotly itself is in it
    assert "sendChartToCloud" in content[content.index("modeBarButtonsToRemove") :]


def map_figure(folder) -> tuple[list[dict], dict]:
    """Traces and layout that the map page draws."""
    content = (folder / "map.html").read_text()
    start = content.index("[", content.rindex("Plotly.newPlot("))
    decoder = json.JSONDecoder()
    traces, end = decoder.raw_decode(content, start)
    layout, _ = decoder.raw_decode(content, content.index("{", end))
    return traces, layout


def test_the_map_page_executes_no_text(written):
    content = (written[0] / "map.html").read_text()
    assert EVIL not in content
    assert "<script>alert" not in content
    traces, _ = map_figure(written[0])
    hover = traces[1]["hovertext"][0]
    lines = hover.split("<br>")
    assert lines[:3] == ["<b>t/0</b>", "cluster: goal-team", "source: sport"]
    assert set(re.findall("<[^>]*>", hover)) == {"<b>", "</b>", "<br>"}
    assert html.unescape(" ".join(lines[3:])) == f"Text 0 {EVIL}"
    assert max(len(html.unescape(line)) for line in lines) <= picture.EXCERPT_WIDTH


def test_the_map_page_switches_between_clusters_and_sources(written):
    traces, layout = map_figure(written[0])
    assert [trace["name"] for trace in traces] == [
        *("in no cluster (2)", "goal-team (6)", "bread-pan (4)"),
        *("source unknown (2)", "sport (6)", "food (4)"),
    ]
    assert [trace.get("visible", True) for trace in traces] == [True] * 3 + [False] * 3
    by_cluster, by_source = layout["updatemenus"][0]["buttons"]
    assert by_cluster["args"][0]["visible"] == [True] * 3 + [False] * 3
    assert by_source["args"][0]["visible"] == [False] * 3 + [True] * 3
    assert sum(len(trace["x"]) for trace in traces[:3]) == sum(len(trace["x"]) for trace in traces[3:]) == 12
    assert traces[1]["marker"]["color"] == traces[4]["marker"]["color"]  # sport's cluster looks like sport
    assert len({trace["marker"]["color"] for trace in traces[:3]}) == 3


@pytest.mark.parametrize(("texts", "kind"), [(100, "scatter"), (picture.WEBGL_FROM, "scattergl")])
def test_many_points_are_drawn_by_the_gpu(tmp_path, texts, kind):
    discovery = make_discovery((texts // 2, texts // 2), noise=0, labels=False)
    picture.write_map(discovery, "many", tmp_path / "map.html")
    traces, layout = map_figure(tmp_path)
    assert {trace["type"] for trace in traces} == {kind}
    assert "updatemenus" not in layout
    assert len(traces) == 2


def test_many_clusters_look_different():
    count = 3 * len(picture.COLOURS)
    names = [f"c{number}" for number in range(count)]
    groups = picture.cluster_groups(make_discovery((2,) * count, names=names))
    assert len({(group.colour, group.shape(0)) for group in groups}) == count + 1
    assert len({(group.colour, group.shape(1)) for group in groups}) == count + 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("short", "short"),
        ("a  b\n\tc", "a b c"),
        ("one two three four five", "one two three four ..."),
        ("x" * 30, "x" * 20 + " ..."),
    ],
)
def test_excerpt(text, expected):
    assert picture.excerpt(text, 20) == expected


@pytest.mark.parametrize("title", ["$x_{", "体育", "a\x1b[31m"])
def test_any_title_and_name_can_be_drawn(tmp_path, title):
    discovery = make_discovery()
    groups = [replace(group, name=f"{group.name} {title}") for group in picture.cluster_groups(discovery)]
    picture.draw_map(discovery, groups, title, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)


def test_names_on_a_map_do_not_cover_each_other(tmp_path, monkeypatch):
    figures = []
    save = picture._save
    monkeypatch.setattr(picture, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    discovery = make_discovery((6, 6, 6), names=("goal-team", "bread-pan", "judge-law"))
    discovery.clustering.map_B2[:] = np.random.default_rng(0).normal(size=(20, 2))
    picture.draw_map(discovery, picture.cluster_groups(discovery), "x", tmp_path / "x.png")
    boxes = [text.get_window_extent() for text in figures[0].axes[0].texts]
    assert len(boxes) == 3
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])


# ---- other discoveries ----


def test_without_sources_and_clusters(tmp_path):
    record = report.write_report(make_discovery((), noise=5, names=(), labels=False), tmp_path)
    assert files(tmp_path) == set(record["files"]) == {*report.FIXED} - {page.SOURCES_PNG}
    assert "No cluster was found" in (tmp_path / "index.html").read_text()
    assert record["adjusted_rand"] is None


def test_a_part_of_a_corpus_is_labelled_as_one(tmp_path):
    discovery = make_discovery()
    embedded = replace(discovery.embedded, meta=replace(discovery.embedded.meta, complete=False))
    report.write_report(replace(discovery, embedded=embedded), tmp_path)
    assert "this is a part of the corpus" in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize(
    ("labels", "most", "expected"),
    [
        ({"sport": 95, "food": 3}, 4, "sport 95%, food 3%"),
        ({"sport": 95, "food": 3}, 1, "sport 95%"),
        ({"a": 50, "b": 20, "c": 20}, 2, "a 50%, b 20%, ..."),
        ({"a": 1000, "b": 1}, 4, "a 100%, ..."),
        ({}, 4, ""),
    ],
)
def test_sources(labels, most, expected):
    size = max(sum(labels.values()), 100)
    assert page.sources({"labels": labels, "size": size}, most) == expected


@pytest.mark.parametrize(("layers", "expected"), [(1, "1 expert in 1 of 3 MoE layers"), (3, "3 experts in 3 of 3")])
def test_the_page_says_how_to_steer(tmp_path, layers, expected):
    discovery = make_discovery(names=("погода", "bread-pan"))
    first, second = discovery.clusters
    frequency = torch.full((3, 8), 1 / 8)
    frequency[:layers] = first.vector.frequency[:layers]
    vector = replace(first.vector, domain="погода", frequency=frequency)
    report.write_report(replace(discovery, clusters=(replace(first, vector=vector), second)), tmp_path)
    text = " ".join(Page((tmp_path / "index.html").read_text()).text.split())
    assert expected in text
    for command in ("calibrate", "generate"):
        assert f"steermoe {command} --domain vectors/погода.safetensors --model 'tiny<b>'" in text
    assert (tmp_path / "vectors" / "погода.safetensors").is_file()


def test_the_page_tells_what_speaks_against_the_clusters(tmp_path):
    record = report.write_report(replace(make_discovery(), stability=0.2), tmp_path)
    text = " ".join(Page((tmp_path / "index.html").read_text()).text.split())
    (warning,) = record["warnings"]
    assert warning.startswith("another seed gives other clusters")
    assert warning[1:] in text
    assert record["stability"] == 0.2
    assert "The same index with the clusters that other seeds give: at least 0.20." in text


def test_one_text_in_no_cluster(tmp_path):
    report.write_report(make_discovery(noise=1), tmp_path)
    assert "1 text (9%) is in none" in (tmp_path / "index.html").read_text()


# ---- many and long names ----


def labelled(count, long="") -> Discovery:
    """Two clusters; every text has a source of its own, the first three twice."""
    discovery = make_discovery((count // 2, count - count // 2), noise=0)
    texts = [replace(text, label=f"{long}{n % (count - 3):03d}") for n, text in enumerate(discovery.embedded.texts)]
    return replace(discovery, embedded=replace(discovery.embedded, texts=texts))


def test_rare_sources_are_one_group():
    groups = picture.source_groups(labelled(323))
    assert [group.name for group in groups[:4]] == ["290 other sources", "000", "001", "002"]
    assert len(groups) == 1 + picture.MOST_NAMED
    rows = np.concatenate([group.rows for group in groups])
    assert sorted(rows) == list(range(323))
    assert groups[0].style is None
    assert len(picture.source_groups(labelled(33))) == picture.MOST_NAMED


def test_maps_with_many_and_long_names_stay_readable(tmp_path, monkeypatch):
    figures = []
    save = picture._save
    monkeypatch.setattr(picture, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    discovery = labelled(323, long="source with a rather long name, such as https://example.org/")
    title = "a model with a very long name " * 8
    picture.draw_map(discovery, picture.source_groups(discovery), title, tmp_path / "x.png")
    (figure,) = figures
    figure.draw_without_rendering()
    width, height = figure.bbox.width, figure.bbox.height
    legend = figure.legends[0].get_window_extent()
    assert legend.height <= height
    assert figure.axes[0].get_window_extent().width > 0.6 * width
    title_box = figure.axes[0].title.get_window_extent()
    assert title_box.x0 >= 0
    assert title_box.x1 <= width
    names = figure.axes[0].texts
    assert 3 <= len(names) <= picture.MOST_NAMED
    assert max(len(text.get_text()) for text in names) <= picture.LONGEST_NAME
    frame = figure.axes[0].get_window_extent()
    boxes = [text.get_window_extent() for text in names]
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)
    assert len({text.get_text() for text in figure.legends[0].get_texts()}) == 1 + picture.MOST_NAMED
    picture.write_map(discovery, "x", tmp_path / "map.html")
    traces, _ = map_figure(tmp_path)
    assert len(traces) == 2 + 1 + picture.MOST_NAMED
    assert "https://example.org/005" in "".join(hover for trace in traces for hover in trace["hovertext"])


def test_names_without_room_are_in_the_legend_only(tmp_path, monkeypatch):
    """All points at one place: a few names fit above them, and none leaves the frame or lies far away."""
    figures = []
    save = picture._save
    monkeypatch.setattr(picture, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    discovery = labelled(33)
    discovery.clustering.map_B2[:-1] = 1.0
    discovery.clustering.map_B2[-1] = 2.0
    picture.draw_map(discovery, picture.source_groups(discovery), "x", tmp_path / "x.png")
    (axes,) = figures[0].axes
    assert 2 <= len(axes.texts) < 10
    assert {text.get_text() for text in axes.texts} >= {"000", "001", "002"}  # the largest
    assert len(figures[0].legends[0].get_texts()) == picture.MOST_NAMED


def test_many_clusters_are_not_all_named(tmp_path, monkeypatch):
    figures = []
    save = picture._save
    monkeypatch.setattr(picture, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    count = 100
    discovery = make_discovery((2,) * count, names=[f"_c{number}" for number in range(count)])
    picture.draw_map(discovery, picture.cluster_groups(discovery), "x", tmp_path / "x.png")
    legend = figures[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()][:2] == [" in no cluster (2)", " _c0 (2)"]
    assert len(legend.get_texts()) == 1 + picture.MOST_NAMED
    assert legend.get_title().get_text() == "and 70 smaller ones"
    assert len(figures[0].axes[0].collections) == 1 + count


# ---- reports that fail ----


def test_a_report_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments, **options):
        raise OSError("512 requested and 0 written")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(SteerMoEError, match=r"the disk may be full \(512 requested and 0 written\); name another"):
        report.write_report(make_discovery(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    report.write_report(make_discovery(), tmp_path)


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    report.write_report(make_discovery(), tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "_write_table", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write_report(make_discovery(names=("football", "kitchen")), tmp_path, force=True)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


@pytest.mark.parametrize("moved", [0, 1, 3, 7])
def test_what_a_killed_run_left_is_no_report(tmp_path, monkeypatch, moved):
    monkeypatch.setattr(report.shutil, "rmtree", lambda *arguments, **options: None)

    def killed_when_moving(folder, names):
        for name in names[:moved]:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / report.UNFINISHED / name).replace(folder / name)
        raise KeyboardInterrupt

    put = report._put_in_place
    monkeypatch.setattr(report, "_put_in_place", killed_when_moving)
    with pytest.raises(KeyboardInterrupt):
        report.write_report(make_discovery(), tmp_path)
    monkeypatch.undo()
    assert put is report._put_in_place
    assert (tmp_path / report.UNFINISHED).is_dir()
    report.check_ready(tmp_path)
    record = report.write_report(make_discovery(names=("football", "kitchen")), tmp_path)
    assert files(tmp_path) == set(record["files"])


# ---- earlier reports ----


def test_an_earlier_report_is_only_replaced_on_request_and_other_files_stay(tmp_path):
    report.write_report(make_discovery(), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "vectors" / "mine.safetensors").write_text("mine")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    renamed = make_discovery(names=("football", "kitchen"), labels=False)
    with pytest.raises(CorpusError, match=r"already has a report \(.*\): pass --force"):
        report.write_report(renamed, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    record = report.write_report(renamed, tmp_path, force=True)
    assert files(tmp_path) == {*record["files"], "notes.txt", "vectors/mine.safetensors"}
    assert "vectors/football.safetensors" in record["files"]
    assert "map_sources.png" not in record["files"]


@pytest.mark.parametrize("name", ["../precious.txt", "/etc/hosts", "vectors/../precious.txt", "precious.txt", 5])
def test_a_forged_list_of_files_removes_nothing_else(tmp_path, name):
    folder = tmp_path / "report"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "precious.txt").write_text("mine")
    (folder / "report.json").write_text(json.dumps({"files": [name]}))
    report.write_report(make_discovery(), folder, force=True)
    assert (tmp_path / "precious.txt").read_text() == (folder / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"files": 3}'])
def test_a_damaged_report_is_replaced(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    record = report.write_report(make_discovery(), tmp_path, force=True)
    assert files(tmp_path) == set(record["files"])


def test_a_vector_of_that_name_is_not_overwritten(tmp_path):
    path = tmp_path / "vectors" / "goal-team.safetensors"
    path.parent.mkdir()
    path.write_text("mine")
    with pytest.raises(CorpusError, match=r"vectors/goal-team.safetensors"):
        report.write_report(make_discovery(), tmp_path)
    assert files(tmp_path) == {"vectors/goal-team.safetensors"}


def test_names_in_other_scripts_are_replaced_too(tmp_path):
    report.write_report(make_discovery(names=("погода", "bread-pan")), tmp_path)
    record = report.write_report(make_discovery(), tmp_path, force=True)
    assert files(tmp_path) == set(record["files"])


def test_check_ready(tmp_path, monkeypatch):
    report.check_ready(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match="is a file, the report needs a folder"):
        report.check_ready(tmp_path / "file", force=True)
    (tmp_path / "index.html").touch()
    with pytest.raises(CorpusError, match=r"\(index.html\): pass --force"):
        report.check_ready(tmp_path)
    report.check_ready(tmp_path, force=True)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SteerMoEError, match=r"needs umap-learn and .*pip install 'steermoe\[discover\]'"):
        report.check_ready(tmp_path / "new")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match=r"can't write the report to .*Not a directory; name another"):
        report.write_report(make_discovery(), tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("module", "draw"),
    [
        ("matplotlib.figure", lambda discovery, path: picture.draw_map(discovery, [], "x", path)),
        ("plotly.graph_objects", lambda discovery, path: picture.write_map(discovery, "x", path)),
    ],
)
def test_a_library_is_missing(tmp_path, monkeypatch, module, draw):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SteerMoEError, match=r"pip install 'steermoe\[discover\]'"):
        draw(make_discovery(), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
