"""Find the domains of a corpus in a model's routing, and build their steering vectors (Shchukin 2024).

`corpus` reads texts, `embedding` turns them into routing embeddings, `store` keeps those on disk, `clustering` finds
groups of them, `keywords` names the groups, `discover` makes a vector of each, `report` and `picture` show them;
`building` and `labelled` make vectors of texts whose domains are known, `contrast` compares two sets of texts, `health`
tells how a model's routers share their load.
"""
