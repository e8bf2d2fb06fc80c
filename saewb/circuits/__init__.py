"""How the model got to this token: the frozen model, attribution, attribution graphs, interventions on latents."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "attribution",
        "attribution_graph",
        "attribution_nodes",
        "direct_logit",
        "faithfulness",
        "frozen",
        "graph",
        "graph_json",
        "graph_page",
        "influence",
        "intervene",
        "latent_cards",
        "load_graph",
        "replacement",
        "supernodes",
    ],
)
