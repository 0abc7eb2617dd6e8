//! Builds NRI messages from the runtime's pods and containers.

use super::Server;
use crate::convert::container::ContainerMetadata;
use crate::convert::spec::without_host_cpusets;
use crate::nri::messages;
use boxlite_proto::nri::v1alpha1::{Container, PodSandbox};
use boxlite_runtime::{ContainerSnapshot, LiteBox};

/// Returns the NRI message of a pod.
pub(super) fn pod_message(server: &Server, pod: &LiteBox) -> PodSandbox {
    messages::pod(&pod.snapshot(), &server.pod_metadata(pod))
}

/// Returns the NRI message of a container. If its OCI spec cannot be read, the message has no fields of the spec.
pub(super) async fn container_message(pod: &LiteBox, container: &ContainerSnapshot) -> Container {
    let spec = match pod.container_spec(&container.id).await {
        Ok(spec) => Some(spec),
        Err(error) => {
            tracing::warn!(
                id = container.id,
                error = boxlite_runtime::report(&error),
                "failed to read container spec for NRI plugins"
            );
            None
        }
    };
    let record = ContainerMetadata::from_bytes(&container.metadata);
    let (config, now) = (record.config(), record.resources());
    // Plugins and the spec use the CPU numbers of the VM.
    let now = now.as_ref().map(without_host_cpusets);
    let mut message = messages::container(container, &config, spec.as_ref(), now.as_ref());
    message.image = Some(messages::image(
        &config,
        &record.image_ref,
        &container.image_id,
    ));
    message
}

/// Returns the number of vCPUs of the pod's VM.
pub(super) fn vcpus(pod: &LiteBox) -> u32 {
    u32::from(pod.snapshot().options.vcpus)
}
