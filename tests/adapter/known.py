"""What the tests of planned and of added adapters both hold against the released models."""

# size, adapter.layers -> modules that learn and their parameters at r = 8, counted from the released configurations
KNOWN = [
    ("E4B", ["attention", "mlp"], 215, 18_595_840),
    ("E4B", ["attention"], 110, 3_112_960),
    ("E4B", ["attention", "mlp", "audio"], 349, 23_805_952),
    ("E4B", ["audio"], 134, 5_210_112),
    ("E4B", ["vision"], 1, 32_768),
    ("E2B", ["attention", "mlp"], 190, 10_158_080),
]
TOTALS = {"E4B": 7_818_517_072, "E2B": 5_418_464_192}
