"""The tensors that a module keeps for backward, and the number of rows of them that exist at a time.

settings, planning        keep and tile, and the setting that applies to a module
recompute, composites     keep=2: the product is computed again; down projections that contain dropout
forwards, regions         keep=0, keep=1 and tiles: at a call, and in backward
compiled                  the same under torch.compile
rowwise, scopes, operators, children      whether rows are independent, proved from a forward's source
"""
