"""Examples: each op beside the usual formula, then real models on real data. ``python -m examples.demo`` runs them.

python -m examples.long_lists       losses of lists with thousands of documents, beside plain PyTorch
python -m examples.pooling          Lift-Splat pooling, LiDAR sums and pillars, beside the formulas in use
python -m examples.activations      the memory of a training step with one-bit activations
python -m examples.rank_mslr        learning to rank web pages
python -m examples.recommend_ml100k recommending films
python -m examples.bev_lidar        a bird's-eye view of LiDAR scans
python -m examples.lift_splat       a bird's-eye view of what cameras see
python -m examples.spiking_digits   a spiking network reading digits, with a surrogate gradient and without
python -m examples.contrastive_digits   which two views belong to the same picture, with contrastive losses
python -m examples.autograd_tour    the classic lessons of autograd, each result checked
"""
