"""The tensors that a module keeps for backward, and the number of rows of them that exist at a time.

settings, planning                        keep and tile, and the setting that applies to a module
recompute, dropout_projections            keep=2: the product is computed again; down projections that contain dropout
tiled_forward, checkpointed_forward       keep=0, keep=1 and tiles: at a call, and in backward
under_compile                             the same under torch.compile
rowwise_proof, source_evaluation, rowwise_operators, child_modules
                                          whether rows are independent, proved from a forward's source
"""
