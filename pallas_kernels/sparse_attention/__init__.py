"""The `sparse_attention` op: `api` is its public function, `reference` its definition."""
