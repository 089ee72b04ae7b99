"""Raw file -> clip -> shard and index -> planned batch. Knows no model."""
