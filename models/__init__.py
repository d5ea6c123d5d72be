"""The autoencoders, and the one protocol by which the pipeline knows them (models.spec).

Importing this package imports no torch. The public names, by module:

    models.spec         Geometry, Normaliser, EncoderCard, Posterior, VideoEncoder, GeometryError
    models.encoders     resolve_source, describe, load_encoder
    models.errors       CheckpointError, EncoderSourceError, EncoderProbeError
    models.config       VaeConfig, Pyramid, PRESETS, preset
    models.vae          CausalVae, EncodeStream, DecodeStream
    models.training     train_vae, measure_normaliser, TrainSettings, TrainedVae
    models.checkpoint   save_checkpoint, load_checkpoint, read_document
"""
