//! The remote command protocol of exec and attach: its versions, and the streams that a call requests.

/// Streams requested by a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RequestedStreams {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
    pub tty: bool,
}

/// Version of the remote command protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    /// Errors are plain text.
    V1,
    /// V1 with corrections.
    V2,
    /// Adds resize.
    V3,
    /// Adds metav1.Status on the error stream.
    V4,
    /// Adds half-close over WebSocket.
    V5,
}

impl Version {
    /// Parses the name of a subprotocol without base64.
    pub(crate) fn named(name: &str) -> Option<Self> {
        match name {
            "channel.k8s.io" => Some(Self::V1),
            "v2.channel.k8s.io" => Some(Self::V2),
            "v3.channel.k8s.io" => Some(Self::V3),
            "v4.channel.k8s.io" => Some(Self::V4),
            "v5.channel.k8s.io" => Some(Self::V5),
            _ => None,
        }
    }

    /// Returns whether errors are JSON.
    pub(crate) fn json(self) -> bool {
        self >= Self::V4
    }

    /// Returns whether the client may open a stream of terminal sizes.
    pub(crate) fn resizes(self) -> bool {
        self >= Self::V3
    }
}
