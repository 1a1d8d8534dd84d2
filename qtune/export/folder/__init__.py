"""What every exported folder is made of: shards, the files that go along, the manifest."""
