"""One file an op: its mathematics, reference, schema, backward, samples and public function."""
