"""Find the domains of a corpus in a model's routing, and build their steering vectors (Shchukin 2024).

`corpus` reads texts, `embed_corpus` turns them into routing embeddings with an `embedder`, `store` keeps those on disk;
`clustering` groups them, `keywords` names the groups, `discover` makes a vector of each, `report`, `page` and `picture`
show them. `labelled` makes vectors of texts whose domains are known, `contrast` compares two sets of texts, `health`
measures how a model's routers share their load.
"""
