"""The `index_kl` op: `api` is its public function, `reference` its definition."""
