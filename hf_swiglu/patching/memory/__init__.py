"""What a module keeps for backward, and how many rows of it exist at a time.

settings, planning        keep and tile, and which of them a module can have
recompute, composites     keep=2: the product is computed again; down projections with dropout inside
forwards, regions         keep=0, keep=1 and tiles: at a call, and in backward
compiled                  the same under torch.compile
rowwise, scopes, operators, children      whether rows are independent, shown from a forward's source
"""
