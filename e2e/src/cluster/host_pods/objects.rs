//! Objects of a kubeadm-style cluster: kube-proxy and CoreDNS with the roles and ConfigMaps that kubeadm gives them, a static
//! pod, and a service with a client.

use super::images::{BUSYBOX, DNS, PROXY};
use crate::cluster::control_plane::url;
use crate::cluster::pods::IDLE;
use crate::cluster::{DNS_IP, NODE};
use serde_json::{Value, json};

/// Name of the static pod in its manifest.
pub(super) const STATIC: &str = "static";
/// URL and contents of the service's page.
pub(super) const URL: &str = "http://web.default.svc.cluster.local/index.html";
pub(super) const PAGE: &str = "hello from the pod\n";

const COREFILE: &str = ".:53 {
  errors
  ready
  kubernetes cluster.local in-addr.arpa ip6.arpa {
    pods insecure
    fallthrough in-addr.arpa ip6.arpa
    ttl 5
  }
  cache 5
}
";

/// Returns a pod of the host's network, as the static pods of a control plane.
pub(super) fn static_pod() -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": STATIC, "namespace": "kube-system"},
        "spec": {"hostNetwork": true, "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": BUSYBOX, "command": ["sh", "-c", IDLE]}]}})
}

/// Returns the objects of kube-proxy.
pub(super) fn proxy() -> Vec<Value> {
    let mount = "/var/lib/kube-proxy";
    let account = "/var/run/secrets/kubernetes.io/serviceaccount";
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "default",
        "clusters": [{"name": "default", "cluster": {"server": url(), "certificate-authority": format!("{account}/ca.crt")}}],
        "users": [{"name": "default", "user": {"tokenFile": format!("{account}/token")}}],
        "contexts": [{"name": "default", "context": {"cluster": "default", "user": "default"}}],
    });
    let command = json!([
        "kube-proxy",
        format!("--kubeconfig={mount}/kubeconfig.conf"),
        format!("--hostname-override={NODE}"),
        "--proxy-mode=iptables",
        "--cluster-cidr=10.88.0.0/16",
        // The machine's conntrack table is not the cluster's.
        "--conntrack-max-per-core=0",
        "--conntrack-tcp-timeout-established=0",
        "--conntrack-tcp-timeout-close-wait=0"
    ]);
    vec![
        account_of("kube-proxy"),
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "kube-proxy"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"},
            "subjects": [{"kind": "ServiceAccount", "name": "kube-proxy", "namespace": "kube-system"}]}),
        config_map("kube-proxy", "kubeconfig.conf", &kubeconfig.to_string()),
        json!({"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "kube-proxy"},
            "spec": {"selector": {"matchLabels": {"app": "kube-proxy"}},
                "template": {"metadata": {"labels": {"app": "kube-proxy"}}, "spec": {
                    "serviceAccountName": "kube-proxy", "hostNetwork": true, "terminationGracePeriodSeconds": 1,
                    "priorityClassName": "system-node-critical", "tolerations": [{"operator": "Exists"}],
                    "containers": [{"name": "kube-proxy", "image": PROXY, "command": command,
                        "securityContext": {"privileged": true},
                        "readinessProbe": {"httpGet": {"host": "127.0.0.1", "path": "/healthz", "port": 10249}, "periodSeconds": 1},
                        "volumeMounts": [{"name": "config", "mountPath": mount}]}],
                    "volumes": [{"name": "config", "configMap": {"name": "kube-proxy"}}]}}}}),
    ]
}

/// Returns the objects of CoreDNS.
pub(super) fn dns() -> Vec<Value> {
    let list = json!(["list", "watch"]);
    vec![
        account_of("coredns"),
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "system:coredns"},
            "rules": [
                {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": list},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": list}]}),
        json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "system:coredns"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns"},
            "subjects": [{"kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system"}]}),
        config_map("coredns", "Corefile", COREFILE),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "kube-dns"},
            "spec": {"clusterIP": DNS_IP, "selector": {"app": "kube-dns"}, "ports": [
                {"name": "dns", "protocol": "UDP", "port": 53}, {"name": "dns-tcp", "protocol": "TCP", "port": 53}]}}),
        deployment(
            "coredns",
            "kube-dns",
            &json!({
            "serviceAccountName": "coredns", "dnsPolicy": "Default", "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "coredns", "image": DNS, "command": ["coredns", "-conf", "/etc/coredns/Corefile"],
                "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
                "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}]}],
            "volumes": [{"name": "config", "configMap": {"name": "coredns"}}]}),
        ),
    ]
}

/// Returns a web server with its service, and a client.
pub(super) fn workload() -> Vec<Value> {
    let spec = |script: &str| {
        json!({"terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": BUSYBOX, "command": ["sh", "-c", script]}]})
    };
    vec![
        deployment("web", "web", &spec("exec httpd -f -p 80 -h /var/www")),
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}}),
        deployment("client", "client", &spec(IDLE)),
    ]
}

fn account_of(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name}})
}

fn config_map(name: &str, key: &str, text: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {key: text}})
}

fn deployment(name: &str, app: &str, spec: &Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": app}},
            "template": {"metadata": {"labels": {"app": app}}, "spec": spec}}})
}
