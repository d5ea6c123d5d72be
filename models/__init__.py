"""The autoencoders, and the one protocol by which the pipeline knows them (models.spec).

Importing this package imports no torch. The public names, by module:

    spec                Geometry, Normaliser, EncoderCard, Posterior, VideoEncoder, GeometryError
    encoders            resolve_source, describe, load_encoder
    errors              CheckpointError, EncoderSourceError, EncoderProbeError

    config              ModelConfig, BackboneConfig, Pyramid, TopLevel, PRESETS, preset
    autoencoder         CausalAutoencoder, Reconstruction
    two_level           TwoLevelAutoencoder
    build               build_model
    cost                layers, parameters, macs, kmacs_per_pixel

    chunks              ChunkedStream, StreamState
    streamed            ChunkedEncoder, EncodeStream, DecodeStream, StreamingBackend
    tiles               TiledBackend, halo
    whole               WholeEncoder, WholeBackend
    pretrained          real_configs; a module per family

    bottlenecks.config      NoBottleneck, Kl, Vq, ResidualVq, Fsq, Lfq, Gumbel, bottleneck_from_json
    bottlenecks.interface   Bottleneck, Bottlenecked
    bottlenecks.registry    BOTTLENECKS, build_bottleneck; a module per family

    kinds.kind          Kind, Objective, Terms, Adversary, DiscriminatorTerms
    kinds.registry      KINDS, kind_class; a module per kind

    losses              ReconstructionWeights, reconstruction_loss, and each loss
    lpips               Lpips, load_lpips
    adversary           AdversarySettings, PatchAdversary
    discriminators      PatchDiscriminator
    train_settings      TrainSettings
    trainer             Trainer
    training            train, measure_normaliser, random_objective, TrainedModel
    optimiser           ClippedAdamW
    model_directory     DirectoryFormat, write_directory, read_directory, check_weights, fill
    checkpoint          save_checkpoint, load_checkpoint, read_document, ModelDocument

    generative.bounds               elbo, importance_weighted_bound, bits_per_dimension, PixelModel
    generative.likelihoods          Gaussian, Laplace, LogitLaplace
    generative.pca                  PatchPca, PatchPcaMeter, psnr
    generative.interpolation        interpolate
    generative.sampling             prior_names, sample_latents
    generative.codes                codebook_sizes, code_extents, latent_to_grids, grids_to_latent
    generative.prior                CodePrior
    generative.prior_config         PriorConfig
    generative.prior_training       train_prior, measure_bits_per_code, PriorSettings, TrainedPrior
    generative.prior_checkpoint     save_prior, load_prior
"""
