"""Multi-layer perceptrons."""

from torch import Tensor, nn
from torch.nn import functional

ACTIVATIONS = {"relu": nn.ReLU, "prelu": nn.PReLU}


class MLP(nn.Module):
    """Linear layers with ReLU between them: (..., in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(map(nn.Linear, dims[:-1], dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)"""
        for layer in self.layers[:-1]:
            x = functional.relu(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The transformer's position-wise network with its residual and LayerNorm: (..., D).

    "prelu" learns a slope, one for each network.
    """

    def __init__(self, embed_dim: int, ffn_dim: int, activation: str = "relu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be in {list(ACTIVATIONS)}, not {activation!r}")
        self.activation = ACTIVATIONS[activation]()
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)"""
        return self.norm(x + self.linear2(self.activation(self.linear1(x))))
