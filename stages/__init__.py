"""The library: what each stage computes. Folders follow the flow.

sources     files and their forms → records
ingest      records → rows of one form, rejects with reasons
difficulty  how hard each row is for the student (IFD)
reflection  a teacher rewrites, the student keeps the better version
dictionary  a sparse autoencoder of the student's residual stream, and the targets' prototypes
features    similarity of each row to the targets by what both activate
embedding   a sentence vector of each row
selection   keep or drop, with a reason
mixture     weights of sources by optimal transport, with a certificate
emission    quotas → shards, card, report, lineage

Beside them: engines (models), base (the contract), rows (the schema), rules, storage, errors.
Nothing here imports the application (`pipeline`), and importing `stages` loads no model library.
"""
