"""Floor 0: dotted names of published code and the classes here that they mean."""

from __future__ import annotations

# Targets in the configs of the published repositories, and our classes. In the originals these are copies of the class
# on the right in other files.
ALIASES = {
    "ldm.models.diffusion.ddpm_dream.LatentDiffusion": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.models.diffusion.ddpm_flower.LatentDiffusion": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.models.diffusion.ddpm_pokemon.LatentDiffusion": "ldm.models.diffusion.ddpm.LatentDiffusion",
    "ldm.modules.embedding_manager.EmbeddingManager": "ldm.tuning.embedding_manager.embedding_manager",
    "taming.data.faceshq.CelebAHQTrain": "ldm.data.faces.CelebAHQTrain",
    "taming.data.faceshq.CelebAHQValidation": "ldm.data.faces.CelebAHQValidation",
    "taming.data.faceshq.FFHQTrain": "ldm.data.faces.FFHQTrain",
    "taming.data.faceshq.FFHQValidation": "ldm.data.faces.FFHQValidation",
    "ldm.models.diffusion.ddpm_dream.DDPM": "ldm.models.diffusion.ddpm.DDPM",
    "ldm.modules.diffusionmodules.openaimodel_inject.UNetModel_inject": "ldm.modules.diffusionmodules.openaimodel.UNetModel",  # noqa: E501
    "ldm.modules.diffusionmodules.openaimodel_inject.UNetModel": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
    "ldm.data.personalized_dream.PersonalizedBase": "ldm.data.dreambooth.PersonalizedBase",
    "ldm.data.personalized.PersonalizedBase": "ldm.data.dreambooth.PersonalizedBase",
    "main_dream_booth.DataModuleFromConfig": "ldm.train.datamodule.DataModuleFromConfig",
    "main_dream_booth.ImageLogger": "ldm.train.callbacks.ImageLogger",
    "main.DataModuleFromConfig": "ldm.train.datamodule.DataModuleFromConfig",
    "main.ImageLogger": "ldm.train.callbacks.ImageLogger",
    "src.model.CustomDiffusion": "ldm.models.diffusion.custom.CustomDiffusion",
    "src.custom_modules.FrozenCLIPEmbedderWrapper": "ldm.modules.encoders.modules.FrozenCLIPEmbedderWrapper",
    "src.finetune_data.MaskBase": "ldm.data.custom.MaskBase",
    "train.DataModuleFromConfig": "ldm.train.datamodule.DataModuleFromConfig",
    "train.ImageLogger": "ldm.train.callbacks.ImageLogger",
    "ldm.modules.losses.LPIPSWithDiscriminator": "ldm.modules.losses.contperceptual.LPIPSWithDiscriminator",
    "ldm.models.diffusion.ddpm.LatentInpaintDiffusion": "ldm.models.diffusion.inpainting.LatentInpaintDiffusion",
    "ldm.modules.diffusionmodules.openaimodel.Timestep": "ldm.modules.diffusionmodules.labels.Timestep",
}

# The same for sgm, SDXL's code: its module, our module, and the common names.
SGM = [
    ("sgm.models.diffusion", "ldm.models.diffusion.engine", "DiffusionEngine"),
    ("sgm.models.autoencoder", "ldm.models.autoencoder", "AutoencoderKL IdentityFirstStage"),
    ("sgm.modules", "ldm.modules.encoders.conditioner", "GeneralConditioner"),
    ("sgm.modules.encoders.modules", "ldm.modules.encoders.conditioner", "GeneralConditioner ConcatTimestepEmbedderND"),
    ("sgm.modules.encoders.modules", "ldm.modules.encoders.modules", "FrozenCLIPEmbedder ClassEmbedder"),
    (
        "sgm.modules.encoders.modules",
        "ldm.modules.encoders.open_clip",
        "FrozenOpenCLIPEmbedder FrozenOpenCLIPEmbedder2",
    ),
    ("sgm.modules.diffusionmodules.openaimodel", "ldm.modules.diffusionmodules.openaimodel", "UNetModel"),
    ("sgm.modules.diffusionmodules.openaimodel", "ldm.modules.diffusionmodules.labels", "Timestep"),
    ("sgm.modules.diffusionmodules.denoiser", "ldm.models.diffusion.denoiser", "Denoiser DiscreteDenoiser"),
    (
        "sgm.modules.diffusionmodules.denoiser_scaling",
        "ldm.models.diffusion.denoiser",
        "EDMScaling EpsScaling VScaling VScalingWithEDMcNoise",
    ),
    (
        "sgm.modules.diffusionmodules.discretizer",
        "ldm.models.diffusion.discretizer",
        "Discretization EDMDiscretization LegacyDDPMDiscretization",
    ),
    ("sgm.modules.diffusionmodules.guiders", "ldm.models.diffusion.guiders", "VanillaCFG IdentityGuider"),
    (
        "sgm.modules.diffusionmodules.sampling",
        "ldm.models.diffusion.edm_samplers",
        "BaseDiffusionSampler EDMSampler AncestralSampler EulerEDMSampler HeunEDMSampler EulerAncestralSampler "
        "DPMPP2SAncestralSampler DPMPP2MSampler LinearMultistepSampler",
    ),
    ("sgm.modules.diffusionmodules.loss", "ldm.models.diffusion.sigma_loss", "StandardDiffusionLoss"),
    (
        "sgm.modules.diffusionmodules.loss_weighting",
        "ldm.models.diffusion.sigma_loss",
        "UnitWeighting EDMWeighting VWeighting EpsWeighting",
    ),
    ("sgm.modules.diffusionmodules.sigma_sampling", "ldm.models.diffusion.sigma_loss", "EDMSampling DiscreteSampling"),
    ("sgm.modules.diffusionmodules.wrappers", "ldm.models.diffusion.wrapper", "OpenAIWrapper"),
    ("sgm.lr_scheduler", "ldm.lr_scheduler", "LambdaLinearScheduler LambdaWarmUpCosineScheduler"),
]
ALIASES |= {f"{theirs}.{name}": f"{ours}.{name}" for theirs, ours, names in SGM for name in names.split()}
ALIASES["sgm.models.autoencoder.AutoencoderKLInferenceWrapper"] = "ldm.models.autoencoder.AutoencoderKL"
