"""Expert replication, placement and migration for mixture-of-experts models."""
