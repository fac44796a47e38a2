"""The `select_blocks` op: `api` is its public function, `reference` its definition."""
