"""What a store holds of pipelines: the ledger, the folders of artifacts, work and logs, and a copy of the spool."""
