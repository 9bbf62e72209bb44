"""Readers of hostile bytes, fed by a fuzzer. `targets` says what is read, `harness` feeds it, `test_fuzz`
runs it for a while and looks at the end."""
