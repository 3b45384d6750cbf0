"""The library: what each stage computes. Folders follow the flow.

sources     files and their forms → records
ingest      records → rows of one form, rejects with reasons
difficulty  how hard each row is for the student (IFD, r-IFD)
thinking    whether an adaptive-thinking model would think about it
pass_rate   how often a model answers it correctly
allocation  a budget of further rollouts, shared out where they tell most
reasoning   length, review ratio and failed steps of a chain of thought
reflection  a teacher rewrites, the student keeps the better version
prefixes    the first tokens of a model's own solutions, to be trained on
dictionary  a sparse autoencoder of the student's residual stream, trained here or brought
prototypes  what the targets activate
features    similarity of each row to the targets by what both activate
concepts    the latents that bear on what comes next, token by token
embedding   a sentence vector of each row
baselines   random, longest, and four similarities to the targets, to compare with
valuation   what each row adds to the pool's nearness to the targets
selection   keep or drop, with a reason
explanation what made selected rows similar, for the report
mixture     weights of sources by optimal transport, with a certificate
emission    quotas → shards, card, report, lineage

Outside the flow: groups (difficulty groups and cost-of-pass, for `tamis analyse`), synthesis (new
problems and their solutions, for `tamis synthesize`), pilots (small trainings on a design of
mixtures) and forecast (what they say of other mixtures and budgets), both for `tamis pilot`.

Beside them: session (all of it on rows in memory, for notebooks and scripts), engines (models),
base (the contract), rows (the schema), rules, storage, errors. Nothing here imports the application
(`pipeline`), and importing `stages` loads no model library.
"""

from stages.lazy import lazy_names

__all__ = ["Session"]

__getattr__ = lazy_names(__name__, {"Session": "session.session"})
