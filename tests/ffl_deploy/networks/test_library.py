"""Networks of torchvision and timm as stages: the same function as the library's own,
cut at its resolutions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ffl_deploy.errors import UsageError
from ffl_deploy.networks.backbones import build_backbone, feature_shape
from ffl_deploy.networks.library import build_model, stages_of
from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig

Disturb = Callable[[nn.Module], nn.Module]

# name -> (image side, stages, channels of the last map); one of each family
FAST = {
    "torchvision:resnet18": (64, 5, 512),
    "torchvision:mobilenet_v2": (64, 5, 1280),
    "timm:mobilenetv3_small_100": (64, 5, 576),
    "timm:convnext_atto": (64, 4, 320),
}
SLOW = {
    "timm:swin_tiny_patch4_window7_224": (56, 4, 768),
    "timm:resnet18": (64, 5, 512),
    "torchvision:densenet121": (64, 5, 1024),
    "torchvision:alexnet": (96, 3, 256),
    "torchvision:vgg11_bn": (64, 5, 512),
    "torchvision:squeezenet1_1": (64, 4, 512),
    "torchvision:googlenet": (64, 5, 1024),
    "torchvision:inception_v3": (96, 7, 2048),
    "torchvision:shufflenet_v2_x0_5": (64, 4, 1024),
    "torchvision:mobilenet_v3_small": (64, 5, 576),
    "torchvision:mnasnet0_5": (64, 5, 1280),
    "torchvision:efficientnet_b0": (64, 5, 1280),
    "torchvision:efficientnet_v2_s": (64, 5, 1280),
    "torchvision:regnet_y_400mf": (64, 5, 440),
    "torchvision:resnext50_32x4d": (64, 5, 2048),
    "torchvision:convnext_tiny": (64, 4, 768),
    "torchvision:swin_t": (64, 4, 768),
    "torchvision:swin_v2_t": (64, 4, 768),
    "torchvision:maxvit_t": (224, 5, 512),
    "timm:efficientnet_b0": (64, 5, 1280),
    "timm:densenet121": (64, 5, 1024),
    "timm:regnety_002": (64, 5, 368),
    "timm:resnetv2_50": (64, 5, 2048),
    "timm:resnet26d": (64, 5, 2048),
    "timm:hrnet_w18_small": (64, 1, 2048),
    "timm:dla34": (64, 6, 512),
    "timm:vgg11_bn": (64, 5, 512),
    "timm:inception_v3": (96, 7, 2048),
    "timm:nfnet_l0": (64, 5, 2304),
    "timm:dpn68": (64, 5, 832),
    "timm:repvgg_a0": (64, 5, 1280),
    "timm:ghostnet_100": (64, 5, 960),
    "timm:mobilevit_xxs": (64, 5, 320),
    "timm:edgenext_xx_small": (64, 4, 168),
    "timm:poolformer_s12": (64, 4, 512),
    "timm:pvt_v2_b0": (64, 4, 256),
    "timm:maxvit_pico_rw_256": (256, 5, 256),
    "timm:cspresnet50": (64, 5, 1024),
    "timm:xception41": (64, 5, 2048),
    "timm:tresnet_m": (64, 4, 2048),
    "timm:rexnet_100": (64, 5, 1280),
    "timm:selecsls42b": (64, 1, 1024),
    "timm:skresnet18": (64, 5, 512),
    "timm:res2net50_26w_4s": (64, 5, 2048),
    "timm:fastvit_t8": (64, 5, 768),
    "timm:gcvit_xxtiny": (224, 4, 512),
    "timm:davit_tiny": (64, 4, 768),
    "timm:focalnet_tiny_srf": (64, 4, 768),
}
ALL = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


def features_before_the_classifier(name: str, model: nn.Module, images: Tensor) -> Tensor:
    """-> independently of the code under test: the map, or its average where the model hands on only that."""
    if name.startswith("timm:"):
        return model.forward_features(images)
    seen: list[Tensor] = []
    head = next(child for key, child in model.named_children() if key in ("avgpool", "classifier", "fc"))
    handle = head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    model(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", ALL)
def test_the_stages_compute_what_the_library_computes(name: str, disturb: Disturb) -> None:
    side, count, channels = {**FAST, **SLOW}[name]
    model = build_model(name, side, side).eval()
    with torch.no_grad():
        stages = stages_of(name, model, side, side)
        disturb(model)  # the stages are made of the model's own modules
        images = torch.randn(2, 3, side, side)
        wanted, x = features_before_the_classifier(name, model.eval(), images), images
        for stage in stages:
            given = x.clone()
            x, before = stage.eval()(x), x
            assert torch.equal(before, given), "a stage changes no input: branches share it"
            assert x.ndim == 4
    assert len(stages) == count
    assert x.shape[1] == channels
    if wanted.ndim == 2:
        torch.testing.assert_close(
            x.mean(dim=(2, 3)), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())
        )
    else:
        wanted = wanted if wanted.shape == x.shape else wanted.permute(0, 3, 1, 2)
        torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert wanted.std() > 0


@pytest.mark.parametrize("name", ALL)
def test_every_weight_of_every_stage_learns(name: str) -> None:
    """No classifier, auxiliary head or other rest of the library's model is left in a branch."""
    side = max({**FAST, **SLOW}[name][0], 64)
    stages = build_backbone(name, side, side).stages
    x = torch.randn(2, 3, side, side)
    for stage in stages:
        assert stage.training
        x = stage(x)
    x.square().sum().backward()
    idle = [
        key for k, stage in enumerate(stages) for key, p in stage.named_parameters(f"{k}") if p.grad is None
    ]
    assert not idle
    assert all(any(True for _ in stage.parameters()) for stage in stages), (
        "a stage without weights cannot be a branch"
    )


@pytest.mark.parametrize(
    "name",
    [
        "timm:vit_tiny_patch16_224",
        pytest.param("torchvision:vit_b_16", marks=pytest.mark.slow),
        "timm:levit_128s",
    ],
)
def test_models_without_a_feature_map_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} gives tokens, not a feature map"):
        build_backbone(name, 224, 224)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision:resnet19", "torchvision has no model 'resnet19'. Did you mean 'torchvision:resnet18'"),
        ("timm:resnet19", "timm has no model 'resnet19'. Did you mean 'timm:resnet"),
        ("timm:", "timm has no model ''"),
        ("timm:zzzzzz", r"Check the spelling. \(timm.list_models\(\) lists all \d+"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no model"),
        ("timm:resnet18.nothing", r"Invalid pretrained tag \(nothing\)"),
    ],
)
def test_unknown_names_are_met_with_near_ones(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        build_backbone(name, 32, 32)


def test_a_size_that_the_network_cannot_take_is_named() -> None:
    with pytest.raises(UsageError, match=r"images of 8x8 do not suit .* larger --image-size"):
        MutualNetwork(NetworkConfig(("torchvision:alexnet",), 3, 8, 8, fusion=None))


def test_libraries_are_imported_only_when_asked_for() -> None:
    code = (
        "import sys; from ffl_deploy.networks.mutual import MutualNetwork, NetworkConfig; "
        "MutualNetwork(NetworkConfig(('resnet20',), 3, 32, 32, fusion=None)); "
        "print('timm' in sys.modules, 'torchvision' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "False"]


def test_building_is_reproducible_and_leaves_the_random_state_to_the_library() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(5)
        stages = nn.Sequential(*build_backbone("torchvision:resnet18", 32, 32).stages)
        weights.append((stages.state_dict(), torch.rand(1)))
    assert all(torch.equal(value, weights[1][0][name]) for name, value in weights[0][0].items())
    assert torch.equal(weights[0][1], weights[1][1])
    torch.manual_seed(5)
    own = build_model("torchvision:resnet18", 32, 32)
    assert torch.equal(own.conv1.weight, stages[0][0].weight), "the library's own initialisation"


def test_branches_of_one_library_architecture_share_all_but_the_last_stage() -> None:
    network = MutualNetwork(NetworkConfig(("torchvision:resnet18",) * 2, 10, 32, 32))
    assert (len(network.trunk), len(network.branches[0])) == (4, 1)
    assert sum(p.numel() for p in network.branches[0].parameters()) == 8_393_728  # layer4 of ResNet-18
    assert network(torch.randn(2, 3, 32, 32)).fused.shape == (2, 10)


@pytest.mark.slow
def test_maps_of_windowed_attention_reach_gate_and_fusion_channels_first() -> None:
    config = NetworkConfig(("timm:swin_tiny_patch4_window7_224",) * 2, 5, 56, 56, aggregator="gate")
    network = MutualNetwork(config).eval()
    assert network.aggregator.linear.in_features == 384
    outputs = network(torch.randn(1, 3, 56, 56))
    assert outputs.features[0].shape[1] == 768
    assert outputs.aggregated.shape == (1, 5)


def test_feature_shapes_of_the_smallest_images() -> None:
    stages = nn.Sequential(*build_backbone("timm:mobilenetv3_small_100", 32, 32).stages)
    assert feature_shape(stages, 8, 8) == (576, 1, 1)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever a library connects with, this process reaches nothing;
    and finds no weights of earlier downloads."""
    import socket

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's attempts
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_weights_that_cannot_be_downloaded_are_one_sentence(name: str) -> None:
    with pytest.raises(
        UsageError,
        match=f"published weights of {name} cannot be had .*train from scratch without --pretrained",
    ):
        MutualNetwork(NetworkConfig((name, "resnet20"), 3, 32, 32), pretrained=True)


@pytest.mark.usefixtures("no_network")
def test_without_a_network_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's own way is many attempts with pauses between them, and a line for each."""
    import huggingface_hub

    asked: list[float] = []

    class Session:
        def head(self, address: str, timeout: float) -> None:
            asked.append(timeout)
            raise OSError("network is unreachable")

    # read when it is imported, by which time a server's test may have set it
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    with pytest.raises(UsageError, match=r"they are not in .*hf, and .* does not answer: OSError") as raised:
        MutualNetwork(NetworkConfig(("timm:resnet18", "resnet20"), 3, 32, 32), pretrained=True)
    assert "\n" not in str(raised.value)
    assert len(asked) == 1
    assert 0 < asked[0] <= 10


def test_a_server_that_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch, which sets no limit, would wait for ever."""

    def silent(*arguments: object, timeout: float) -> None:
        raise TimeoutError(f"timed out after {timeout:g} s")

    monkeypatch.setattr("urllib.request.urlopen", silent)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    with pytest.raises(
        UsageError, match=r"not in .*, and https://\S+ does not answer: timed out after 10 s\)"
    ):
        MutualNetwork(NetworkConfig(("torchvision:resnet18", "resnet20"), 3, 32, 32), pretrained=True)


def test_weights_that_are_kept_need_no_network_and_damaged_ones_are_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    torch.manual_seed(3)
    published = models.resnet18().state_dict()
    kept = tmp_path / "mine" / "checkpoints" / models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    kept.parent.mkdir(parents=True)
    torch.save(published, kept)
    config = NetworkConfig(("torchvision:resnet18", "resnet20"), 3, 32, 32)
    network = MutualNetwork(config, pretrained=tmp_path / "mine")
    assert torch.equal(network.branches[0][0][0].weight, published["conv1.weight"])

    kept.write_bytes(kept.read_bytes()[:1000])
    with pytest.raises(UsageError, match=rf"are damaged where they are kept, {kept} .*delete that file"):
        MutualNetwork(config, pretrained=tmp_path / "mine")


@pytest.mark.usefixtures("no_network")
def test_timm_too_reads_what_is_kept(tmp_path: Path) -> None:
    import timm
    from safetensors.torch import save_file

    repository = timm.get_pretrained_cfg("resnet18").hf_hub_id
    folder = tmp_path / "mine" / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1" * 40)
    torch.manual_seed(3)
    published = timm.create_model("resnet18").state_dict()
    save_file(published, snapshot / "model.safetensors")
    config = NetworkConfig(("timm:resnet18", "resnet20"), 3, 32, 32)
    network = MutualNetwork(config, pretrained=tmp_path / "mine")
    assert any(torch.equal(value, published["conv1.weight"]) for value in network.state_dict().values())
    (snapshot / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=r"are damaged where they are kept, .*model.safetensors"):
        MutualNetwork(config, pretrained=tmp_path / "mine")


def test_pretrained_needs_a_branch_that_has_published_weights() -> None:
    with pytest.raises(
        UsageError,
        match="no published weights of resnet20: --pretrained is for torchvision:NAME and timm:NAME",
    ):
        MutualNetwork(NetworkConfig(("resnet20", "resnet20"), 3, 32, 32), pretrained=True)


def test_pretrained_weights_reach_the_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the download replaced by weights made here."""
    from torchvision import models

    torch.manual_seed(3)
    published = models.resnet18().state_dict()
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", lambda self, *a, **k: published)
    monkeypatch.setattr("ffl_deploy.networks.library.require_answer", lambda url: None)
    network = MutualNetwork(NetworkConfig(("torchvision:resnet18", "resnet20"), 3, 32, 32), pretrained=True)
    assert torch.equal(network.branches[0][0][0].weight, published["conv1.weight"])
    assert torch.equal(network.branches[0][4][1].bn2.running_var, published["layer4.1.bn2.running_var"])


@pytest.mark.parametrize(
    "name", ["timm:mobilenetv3_small_050", "torchvision:efficientnet_b0"], ids=["timm", "torchvision"]
)
def test_stochastic_depth_is_the_library_s_and_off_outside_training(name: str) -> None:
    """The same weights whatever the probability; images skip blocks in training alone."""
    torch.manual_seed(0)
    often = MutualNetwork(NetworkConfig((name,), 3, 64, 64, fusion=None), stochastic_depth=0.9)
    never = MutualNetwork(NetworkConfig((name,), 3, 64, 64, fusion=None), stochastic_depth=0.0)
    never.load_state_dict(often.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for network in (often, never):
        for module in network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0
    assert torch.equal(often.eval()(images).branches[0], never.eval()(images).branches[0])

    def passes(network: MutualNetwork) -> int:
        network.train()
        return len({network(images).features[0].detach().numpy().tobytes() for _ in range(4)})

    assert passes(never) == 1
    assert passes(often) > 1


@pytest.mark.parametrize(
    "name",
    ["torchvision:resnet18", "torchvision:swin_t", "timm:vgg11", "resnet8"],
    ids=["torchvision", "fixed there", "timm", "own"],
)
def test_stochastic_depth_that_cannot_be_set_is_one_sentence(name: str) -> None:
    with pytest.raises(UsageError, match="--stochastic-depth") as refused:
        build_backbone(name, 64, 64, stochastic_depth=0.1)
    assert name in str(refused.value)
    assert str(refused.value).count("\n") == 0
