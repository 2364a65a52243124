"""The loop of the README, complete: python examples/plain_loop.py."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import esper


def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets)


def main(epochs: int = 40) -> nn.Module:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    train, held_out, test = random_split(digits, [1197, 240, 360])
    loader = DataLoader(train, batch_size=64, shuffle=True)
    probe = DataLoader(held_out, batch_size=240)  # decides what grows; never trained on

    net = nn.Sequential(nn.Linear(64, 2), nn.ReLU(), nn.Linear(2, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    steps = epochs * len(loader)
    config = {"budget": {"growth_factor": 16.0}}
    growth = esper.grow(net, optimizer, loss_fn, probe=probe, steps=steps, config=config)
    for _ in range(epochs):
        for batch in loader:
            loss = loss_fn(net, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            growth.step(batch, loss)
    net = growth.finish()  # the same object, wider

    inputs, targets = test[:]
    accuracy = (net(inputs).argmax(1) == targets).float().mean().item()
    for plan in growth.plans:
        print(f"{plan.site}: {plan.units} units more")
    print(net)
    print(f"accuracy {accuracy:.3f} with {sum(p.numel() for p in net.parameters())} parameters")
    share = growth.cost.growth_flops / growth.cost.training_flops
    print(f"growing cost {share:.0%} on top of training, {growth.cost.seconds:.1f} s")
    return net


if __name__ == "__main__":
    main()
