//! Conversion of images to the CRI's, and of the CRI's credentials to the registry client's.

use boxlite_proto::cri::v1::{
    AuthConfig, FilesystemIdentifier, FilesystemUsage, Image, ImageSpec, Int64Value, UInt64Value,
};
use boxlite_runtime::images::{
    ImageError, ImageErrorKind, ImageFsInfo, ImageRecord, ImageUser, RegistryAuth,
};
use tonic::{Code, Status};

/// Converts an image.
pub(crate) fn image(record: &ImageRecord) -> Image {
    let (uid, username) = match record.user() {
        ImageUser::Unset => (Some(Int64Value { value: 0 }), String::new()),
        ImageUser::Uid(value) => (Some(Int64Value { value }), String::new()),
        ImageUser::Name(name) => (None, name),
    };
    Image {
        id: record.id.clone(),
        repo_tags: record.repo_tags.clone(),
        repo_digests: record.repo_digests.clone(),
        size: record.size_bytes,
        uid,
        username,
        spec: Some(ImageSpec {
            image: record.id.clone(),
            ..Default::default()
        }),
        pinned: record.pinned,
    }
}

/// Converts credentials; `None` for a missing or empty AuthConfig.
pub(crate) fn auth(auth: Option<AuthConfig>) -> Option<RegistryAuth> {
    let auth = auth.filter(|auth| *auth != AuthConfig::default())?;
    Some(RegistryAuth {
        username: auth.username,
        password: auth.password,
        auth: auth.auth,
        identity_token: auth.identity_token,
        registry_token: auth.registry_token,
        server_address: auth.server_address,
    })
}

/// Converts the usage of the image store.
pub(crate) fn usage(info: &ImageFsInfo) -> FilesystemUsage {
    FilesystemUsage {
        timestamp: info.timestamp_ns,
        fs_id: Some(FilesystemIdentifier {
            mountpoint: info.path.to_string_lossy().into_owned(),
        }),
        used_bytes: Some(UInt64Value {
            value: info.used_bytes,
        }),
        inodes_used: Some(UInt64Value {
            value: info.inodes_used,
        }),
    }
}

/// Returns the gRPC status of an image error.
pub(crate) fn status(error: &ImageError) -> Status {
    Status::new(code(error.kind()), error.report())
}

/// Returns the gRPC code of an error class.
pub(crate) fn code(kind: ImageErrorKind) -> Code {
    match kind {
        ImageErrorKind::InvalidReference => Code::InvalidArgument,
        ImageErrorKind::NotFound => Code::NotFound,
        ImageErrorKind::Unauthorized => Code::Unauthenticated,
        ImageErrorKind::Corrupt => Code::DataLoss,
        ImageErrorKind::InvalidImage
        | ImageErrorKind::NoPlatform
        | ImageErrorKind::InUse
        | ImageErrorKind::Config => Code::FailedPrecondition,
        ImageErrorKind::NoSpace | ImageErrorKind::TooLarge => Code::ResourceExhausted,
        ImageErrorKind::Unavailable => Code::Unavailable,
        ImageErrorKind::Cancelled => Code::Cancelled,
        ImageErrorKind::Internal => Code::Internal,
    }
}
