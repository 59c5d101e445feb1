"""BigGAN-deep's generator in torch, written for the tests from the paper's appendix B.

Parameter names are those of the published PyTorch weights, so `state_dict()` here has the published
layout. Layers' sizes come from the fields of the published `config.json`.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import spectral_norm


class Norm(nn.Module):
    """Batch norm with a table of statistics; `mix` names the rows to use and their weights."""

    def __init__(self, features, config, condition=0):
        super().__init__()
        self.eps = config["eps"]
        self.register_buffer("running_means", torch.randn(config["n_stats"], features) / 4)
        self.register_buffer("running_vars", torch.rand(config["n_stats"], features) + 0.2)
        if condition:
            self.scale = spectral_norm(nn.Linear(condition, features, bias=False))
            self.offset = spectral_norm(nn.Linear(condition, features, bias=False))
        else:
            self.weight = nn.Parameter(torch.rand(features) + 0.5)
            self.bias = nn.Parameter(torch.randn(features) / 4)

    def forward(self, x, mix, condition=None):
        mean = sum(weight * self.running_means[row] for row, weight in mix)
        variance = sum(weight * self.running_vars[row] for row, weight in mix)
        if condition is None:
            gain, bias = self.weight[None], self.bias[None]
        else:
            gain, bias = 1 + self.scale(condition), self.offset(condition)
        y = (x - mean[:, None, None]) / torch.sqrt(variance + self.eps)[:, None, None]
        return y * gain[:, :, None, None] + bias[:, :, None, None]


class Block(nn.Module):
    def __init__(self, up_sample, into, out, condition, config):
        super().__init__()
        self.up_sample, self.out = up_sample, out
        middle = into // 4
        for i, (a, b, k) in enumerate(
            [(into, middle, 1), (middle, middle, 3), (middle, middle, 3), (middle, out, 1)]
        ):
            setattr(self, f"bn_{i}", Norm(a, config, condition))
            setattr(self, f"conv_{i}", spectral_norm(nn.Conv2d(a, b, k, padding=k // 2)))

    def forward(self, x, mix, condition):
        def enlarge(y):
            return functional.interpolate(y, scale_factor=2) if self.up_sample else y

        y = self.conv_0(functional.relu(self.bn_0(x, mix, condition)))
        y = self.conv_1(enlarge(functional.relu(self.bn_1(y, mix, condition))))
        y = self.conv_2(functional.relu(self.bn_2(y, mix, condition)))
        y = self.conv_3(functional.relu(self.bn_3(y, mix, condition)))
        return y + enlarge(x[:, : self.out])


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        for name, into, out in [
            ("theta", c, c // 8),
            ("phi", c, c // 8),
            ("g", c, c // 2),
            ("o_conv", c // 2, c),
        ]:
            conv = spectral_norm(nn.Conv2d(into, out, 1, bias=False))
            setattr(self, f"snconv1x1_{name}", conv)
        self.gamma = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x, mix, condition):
        queries = self.snconv1x1_theta(x).flatten(2)
        keys = functional.max_pool2d(self.snconv1x1_phi(x), 2).flatten(2)
        values = functional.max_pool2d(self.snconv1x1_g(x), 2).flatten(2)
        weights = torch.softmax(queries.transpose(1, 2) @ keys, dim=-1)
        mixed = (values @ weights.transpose(1, 2)).unflatten(2, x.shape[2:])
        return x + self.gamma * self.snconv1x1_o_conv(mixed)


class BigGAN(nn.Module):
    """latents [b z], labels [b], truncation -> images [b 3 s s] in [-1, 1]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config["channel_width"]
        condition = config["z_dim"] + config["class_embed_dim"]
        self.embeddings = nn.Linear(config["num_classes"], config["class_embed_dim"], bias=False)
        generator = self.generator = nn.Module()
        self.first = config["layers"][0][1] * width
        generator.gen_z = spectral_norm(nn.Linear(condition, 16 * self.first))
        blocks = [
            Block(up, a * width, b * width, condition, config) for up, a, b in config["layers"]
        ]
        position = config["attention_layer_position"]
        blocks.insert(position, Attention(config["layers"][position][1] * width))
        generator.layers = nn.ModuleList(blocks)
        generator.bn = Norm(width, config)
        generator.conv_to_rgb = spectral_norm(nn.Conv2d(width, width, 3, padding=1))

    def mix(self, truncation, swapped):
        """The rows of statistics and their weights; `swapped` as in the published code."""
        position = truncation * (self.config["n_stats"] - 1)
        low = int(position)
        share = position - low
        if share == 0:
            return [(low, 1.0)]
        return [(low, share if swapped else 1 - share), (low + 1, 1 - share if swapped else share)]

    def forward(self, latents, labels, truncation=1.0, swapped=False):
        mix, net = self.mix(truncation, swapped), self.generator
        condition = torch.cat([latents, self.embeddings.weight.T[labels]], dim=1)
        # the published gen_z gives height, width, channels in this order
        x = net.gen_z(condition).unflatten(1, (4, 4, self.first)).permute(0, 3, 1, 2)
        for layer in net.layers:
            x = layer(x, mix, condition)
        x = functional.relu(net.bn(x, mix))
        return torch.tanh(net.conv_to_rgb(x)[:, :3])


def random_biggan(config, seed=0):
    """One with all entries random and spectral norms near their true values, in evaluation mode."""
    torch.manual_seed(seed)
    net = BigGAN(config)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("weight_orig"):
                parameter.normal_()
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
        for module in net.train().modules():
            for hook in module._forward_pre_hooks.values():  # power iterations
                for _ in range(5):
                    hook(module, None)
    return net.eval()
