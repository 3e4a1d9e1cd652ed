"""The report's page: one HTML file, from the record that `report` writes. Knows no models."""

import html
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from steermoe.discovery import picture
from steermoe.discovery.discover import Discovery
from steermoe.discovery.store import EmbeddingMeta
from steermoe.errors import count_of

REPORT, INDEX, MAP, TABLE = "report.json", "index.html", "map.html", "clusters.csv"

CLUSTERS_PNG, SOURCES_PNG = "map_clusters.png", "map_sources.png"

EXCERPT = 320

MAX_SOURCES, LEAST_SOURCE = 4, 0.01
"""At most this many known labels of a cluster are named, each with at least this share."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0; }
tr + tr { border-top: 1px solid var(--line); }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.name { white-space: nowrap; }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
blockquote { margin: .5rem 0; padding: .4rem .9rem; border-left: 3px solid var(--line); background: var(--soft); }
blockquote, code { overflow-wrap: anywhere; }
blockquote cite { display: block; font-size: .85em; opacity: .75; font-style: normal; }
code { background: var(--soft); padding: .1rem .3rem; border-radius: 4px; }
.note { font-style: italic; }
"""


def _page(discovery: Discovery, record: Mapping[str, Any]) -> str:
    texts = {text.id: text.text for text in discovery.embedded.texts}
    meta = discovery.embedded.meta
    title = f"Domains in {len(discovery.embedded):,} texts, as {meta.model} routes them"
    maps = "".join(
        f'<a href="{name}"><img src="{name}" alt="{alt}"></a>\n'
        for name, alt in ((CLUSTERS_PNG, "map coloured by cluster"), (SOURCES_PNG, "map coloured by source"))
        if name in record["files"]
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(_summary(discovery))}</p>
{"".join(f'<p class="note">{html.escape(_sentence(warning))}</p>' for warning in record["warnings"])}
<div class="maps">
{maps}</div>
<p><a href="{MAP}">Map with the texts on hover</a>, <a href="{TABLE}">cluster of each text</a> (CSV),
<a href="{REPORT}">all numbers</a> (JSON)</p>
{_table(record["clusters"])}
{"".join(_section(cluster, texts, meta) for cluster in record["clusters"])}
<h2>How it was made</h2>
<table>{"".join(_row(name, value) for name, value in _facts(record).items())}</table>
</body>
</html>
"""


def _summary(discovery: Discovery) -> str:
    noise, are = discovery.noise / len(discovery.embedded), "is" if discovery.noise == 1 else "are"
    words = f"{_clusters(discovery)}; {count_of(discovery.noise, 'text')} ({noise:.0%}) {are} in none."
    if discovery.adjusted_rand is not None:
        words += (
            f" Agreement with the known sources: adjusted Rand index {discovery.adjusted_rand:.2f} "
            "(1: the same groups, 0: as by chance)."
        )
    if discovery.stability is not None:
        words += f" The same index with the clusters that other seeds give: at least {discovery.stability:.2f}."
    if discovery.wording is not None:
        words += (
            f" {discovery.wording.share:.0%} of the texts are in one cluster with the text that is nearest by words "
            f"(by chance {discovery.wording.chance:.0%})."
        )
    if not discovery.embedded.meta.complete:
        words += " The embeddings are not complete: this is a part of the corpus."
    return words


def _clusters(discovery: Discovery) -> str:
    return count_of(len(discovery.clusters), "cluster")


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _table(clusters: Iterable[Mapping[str, Any]]) -> str:
    rows = "".join(
        f'<tr><td class="n">{cluster["number"]}</td>'
        f'<td class="name"><a href="#{cluster["name"]}">{html.escape(cluster["name"])}</a></td>'
        f'<td class="n">{cluster["size"]:,}</td><td>{html.escape(_keywords(cluster))}</td>'
        f"<td>{html.escape(sources(cluster))}</td></tr>\n"
        for cluster in clusters
    )
    head = '<tr><th class="n">no.</th><th>name</th><th class="n">texts</th><th>keywords</th><th>sources</th></tr>'
    return f'<div class="wide"><table>\n{head}\n{rows}</table></div>' if rows else "<p>No cluster was found.</p>"


def _section(cluster: Mapping[str, Any], texts: Mapping[str, str], meta: EmbeddingMeta) -> str:
    name = html.escape(cluster["name"])
    examples = "".join(
        f"<blockquote>{html.escape(picture.excerpt(texts[id_], EXCERPT))}<cite>{html.escape(id_)}</cite></blockquote>\n"
        for id_ in cluster["examples"]
    )
    note = f'<p class="note">{html.escape(_sentence(cluster["note"]))}</p>\n' if cluster["note"] else ""
    own = f"--domain {cluster['vector']} --model {shlex.quote(meta.model)}"
    vector = (
        f'<p><a href="{cluster["vector"]}">Steering vector</a>: {count_of(cluster["experts"], "expert")} '
        f"in {cluster['layers']} of {count_of(len(meta.layers), 'MoE layer')}. In this folder, find its strength with "
        f"<code>{html.escape(f'steermoe calibrate {own}')}</code>, then steer with "
        f"<code>{html.escape(f'steermoe generate {own}')}</code></p>\n"
        f'<img loading="lazy" src="{cluster["picture"]}" alt="frequencies of {name} before and after the threshold">\n'
        if cluster["vector"]
        else ""
    )
    known = f"<p>Sources: {html.escape(sources(cluster))}</p>\n" if cluster["labels"] else ""
    return (
        f'<h2 id="{name}">{name} <small>({cluster["size"]:,} texts)</small></h2>\n'
        f"<p>{html.escape(_keywords(cluster))}</p>\n{known}"
        f"<p>Texts nearest to its middle:</p>\n{examples}{note}{vector}"
    )


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    meta = record["embeddings"]
    facts = {
        "model": f"{meta['model']} ({meta['architecture']})",
        "shape": f"{count_of(len(meta['layers']), 'layer')} x {count_of(meta['num_experts'], 'expert')}",
        "embeddings": f"{meta['features']} over {meta['tokens']} tokens, at most {meta['max_tokens']} a text"
        + (", with hidden states" if meta["hidden"] else ""),
    }
    settings = {name.replace("_", " "): value for name, value in record["settings"].items()}
    return (
        facts | settings | {"versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items())}
    )


def _row(name: str, value: Any) -> str:
    return f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>\n"


def _keywords(cluster: Mapping[str, Any]) -> str:
    return ", ".join(keyword["word"] for keyword in cluster["keywords"])


def sources(cluster: Mapping[str, Any], most: int = MAX_SOURCES) -> str:
    """The labels in a cluster's record with their shares of all its texts, such as "sport 95%, food 3%"."""
    shares = {label: count / cluster["size"] for label, count in list(cluster["labels"].items())[:most]}
    shown = [f"{label} {share:.0%}" for label, share in shares.items() if share >= LEAST_SOURCE]
    return ", ".join(shown + (["..."] if most > 1 and len(shown) < len(cluster["labels"]) else []))
