"""PyTorch's DistributedDataParallel and SyncBatchNorm, to compare with ``ddp_after.py``.

torchrun --nproc-per-node 2 examples/ddp_before.py
"""

import os

import torch
from torch import distributed, nn

cuda = torch.cuda.is_available()
distributed.init_process_group("nccl" if cuda else "gloo")
rank, size = distributed.get_rank(), distributed.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
model = model.to(device)
if cuda:  # on the CPU there is none
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
model = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), 0.05)

x = torch.randn(32, 6, device=device)
target = x[:, :1].tanh()
x, target = x.chunk(size)[rank], target.chunk(size)[rank]
for _ in range(20):
    loss = nn.functional.mse_loss(model(x), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

distributed.all_reduce(loss.detach_())
if rank == 0:
    print(f"loss {loss.item() / size:.6f}")
del model  # DDP keeps the group, whose threads have to end before Python does
distributed.destroy_process_group()
