//! Generates the code for `boxlite/v1` and `cri/v1` (tonic), the NRI messages, and the shim's ttrpc extension.
//!
//! Requires `protoc` (Debian: protobuf-compiler) for gRPC only; the ttrpc code has its own compiler.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=boxlite");
    println!("cargo:rerun-if-changed=cri");
    println!("cargo:rerun-if-changed=nri");
    tonic_prost_build::configure()
        .bytes(".")
        .compile_protos(&["boxlite/v1/service.proto"], &["."])?;
    if std::env::var_os("CARGO_FEATURE_CRI").is_some() {
        tonic_prost_build::configure()
            .bytes(".")
            // Its secrets are marked with debug_redact in the published interface; see src/lib.rs.
            .skip_debug(["runtime.v1.AuthConfig"])
            .compile_protos(&["cri/v1/api.proto"], &["."])?;
    }
    if std::env::var_os("CARGO_FEATURE_NRI").is_some() {
        // Messages only: NRI uses ttrpc over connections that cri-server multiplexes.
        tonic_prost_build::configure()
            .build_client(false)
            .build_server(false)
            .compile_protos(&["nri/v1alpha1/api.proto"], &["."])?;
    }
    if std::env::var_os("CARGO_FEATURE_SHIM").is_some() {
        let out = PathBuf::from(std::env::var("OUT_DIR")?).join("shim");
        std::fs::create_dir_all(&out)?;
        ttrpc_codegen::Codegen::new()
            .out_dir(&out)
            .inputs(["boxlite/v1/shim.proto"])
            .include(".")
            .rust_protobuf()
            .customize(ttrpc_codegen::Customize {
                async_all: true,
                ..Default::default()
            })
            .rust_protobuf_customize(ttrpc_codegen::ProtobufCustomize::default().gen_mod_rs(true))
            .run()?;
        // The generator's mod.rs contains the messages only.
        let modules = out.join("mod.rs");
        let mut text = std::fs::read_to_string(&modules)?;
        text.push_str("pub mod shim_ttrpc;\n");
        std::fs::write(&modules, text)?;
    }
    Ok(())
}
